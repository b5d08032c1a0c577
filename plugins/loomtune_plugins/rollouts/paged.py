"""How transformers' continuous batching is made to continue prompts: its manager, with choices of our own.

| transformers | tried with | what was found |
|---|---|---|
| 5.23.0 | torch 2.13, CPU, sdpa | all that is said here |

- A manager generates in a thread of its own. Autocast is a thread's, and the cache has the type of the module's
  first parameter: `Lower` gives both what the module computes in.
- It sets torch's global seed and puts the whole module into `eval()`; its `stop` gives neither back.
- Left to itself it takes most of the memory for its cache, and fetches a flash attention from the internet.
- What chooses tokens is asked for twice a pass: before it with the requests in the order of its rows, then with logits.
  With CUDA graphs or two passes at once the second would be a recording or come late, so neither is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from loomtune.contracts import Completion, Role, Sampling
from loomtune.world import World
from loomtune_plugins.rollouts.generation import ready, room
from loomtune_plugins.rollouts.noise import Choice
from loomtune_plugins.rollouts.settings import ContinuousSettings

PAGE = {True: 256, False: 16}
"""Tokens of a page of the cache: with flash attention, whose kernels know no smaller ones, and with any other."""


def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampling: Sampling,
    world: World,
    settings: ContinuousSettings,
) -> list[Completion]:
    """Completions of this rank's prompts, in order."""
    rooms = [room(len(prompt), sampling) for prompt in prompts]
    asked = [i for i, count in enumerate(rooms) if count > 0]
    completions = [Completion(())] * len(prompts)
    with ready(role) as module:
        if asked:
            chosen = Keyed(Choice(sampling), {str(i): keys[i] for i in asked})
            longest = max(len(prompts[i]) + rooms[i] for i in asked)
            with _managing(module, chosen, _config(module, settings, len(asked), longest), world) as manager:
                for i in asked:
                    stops = list(sampling.stop) or None
                    manager.add_request(list(prompts[i]), str(i), max_new_tokens=rooms[i], eos_token_id=stops)
                for i, tokens in _results(manager, len(asked)):
                    completions[i] = Completion(tokens, chosen.log_probs(str(i), len(tokens)))
    return completions


def _config(module: Any, settings: ContinuousSettings, count: int, longest: int) -> ContinuousBatchingConfig:
    """longest: tokens of the longest prompt with all that it may be continued by; there is always room for one."""
    page = PAGE["flash" in module.config._attn_implementation]
    at_once = min(settings.batch, count)
    blocks = -(-longest // page) + 1
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=max(settings.cache // page, blocks) if settings.cache else blocks * at_once,
        max_batch_tokens=max(settings.tokens, at_once),
        max_requests_per_batch=at_once,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        disable_nccl_graph_mixing=False,
        seed=0,
    )


@contextmanager
def _managing(module: Any, chosen: Keyed, config: ContinuousBatchingConfig, world: World) -> Iterator[Any]:
    """A manager that generates until the context ends, which leaves the module and the global seeds as they were."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    training = [part for part in module.modules() if part.training]
    devices = [] if world.device.type == "cpu" else [world.device]
    with torch.random.fork_rng(devices, device_type="cuda" if world.device.type == "cpu" else world.device.type):
        manager = module.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), config)
        try:
            manager.logit_processor = chosen
            if torch.is_autocast_enabled(world.device.type):
                manager.model = Lower(module, world.device.type)
            manager.start()
            yield manager
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
            for part in training:
                part.training = True


def _results(manager: Any, count: int) -> Iterator[tuple[int, list[int]]]:
    """Each request's number and tokens, as they are done. Raises RuntimeError where the manager gave one up."""
    while count:
        found = manager.get_result(timeout=1)
        if found is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped") from (
                    manager.background_thread_status.fatal_error
                )
            continue
        if found.error is not None:
            raise RuntimeError(f"transformers' continuous batching gave a prompt up: {found.error}")
        count -= 1
        yield int(found.request_id), found.generated_tokens


class Keyed(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """Chooses tokens by each request's own key, and notes the log-probability of what it chose.

    keys: by a request's id.
    """

    def __init__(self, choice: Choice, keys: dict[str, int]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.choice, self.keys = choice, keys
        self.rows: list[tuple[str, int]] = []
        self.noted: dict[tuple[str, int], Tensor] = {}

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Before a pass: which request the rows of its logits will be of, and how many tokens each has written."""
        self.rows = [(one.state.request_id, _written(one.state)) for one in requests_in_batch if one.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Scores of which the largest is the choice. scores: `(rows, vocabulary)`, behind which others lie that are of
        prompts which are not read to their end yet."""
        if rows := self.rows:
            places = [(self.keys[name], written) for name, written in rows]
            scores[: len(rows)], _, log_probs = self.choice(scores[: len(rows)], places)
            self.noted.update(zip(rows, log_probs.unbind(), strict=True))
        return scores

    def log_probs(self, name: str, count: int) -> list[float]:
        """Of a request's first tokens."""
        return torch.stack([self.noted[name, place] for place in range(count)]).tolist()


def _written(state: Any) -> int:
    """Tokens that a request has written; one that was put off finds its own among those that it begins with."""
    before = len(state.initial_tokens) - state._true_initial_tokens if state._true_initial_tokens else 0
    return before + len(state.generated_tokens)


class Lower:
    """A module in the type that this thread's autocast makes it compute in, also for another thread that calls it."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self._module, self._device = module, device
        self.dtype = torch.get_autocast_dtype(device)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not torch.is_autocast_enabled(self._device):
            # Never left: leaving forgets the weights that were cast, and it ends with the thread.
            torch.autocast(self._device, self.dtype).__enter__()  # type: ignore[no-untyped-call]
            self._admit(named["cache"])
        return self._module(*given, **named)

    def _admit(self, cache: Any) -> None:
        """Lets a cache take keys and values of any type: autocast leaves keys in fp32 where positions turn them."""
        update = cache.update

        def lowered(*, key_states: Tensor, value_states: Tensor, **named: Any) -> Any:
            return update(key_states=key_states.to(self.dtype), value_states=value_states.to(self.dtype), **named)

        cache.update = lowered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
