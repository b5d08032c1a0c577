"""How transformers is made to continue prompts with the weights that are being trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from loomtune.contracts import Completion, Role, Sampling
from loomtune.world import World
from loomtune_plugins.rollouts.noise import Choice

LEAVING = 0.25
"""Part of a batch's rows that must have ended before these leave it. Each leaving copies the cache of those that stay,
and starts transformers' loop anew."""


def generate(
    role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World, batch: int
) -> list[Completion]:
    """Completions of this rank's prompts, in order, `batch` of similar length at once."""
    completions = [Completion(())] * len(prompts)
    with ready(role) as module:
        for chosen, room in _batches(prompts, sampling, batch):
            rows = Rows([prompts[i] for i in chosen], [keys[i] for i in chosen], sampling, room, world.device)
            for i, completion in zip(chosen, rows.completed(module), strict=True):
                completions[i] = completion
    return completions


@contextmanager
def ready(role: Role) -> Iterator[Any]:
    """Within it the whole module, as it is generated from."""
    with role.engine.evaluating(), role.engine.gathered() as module, _own_defaults(module), torch.no_grad():
        yield module


def _batches(prompts: Sequence[Sequence[int]], sampling: Sampling, size: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of at most `size` prompts of similar length, equal ones together, and how many tokens each has room for.

    Prompts near the end of `max_length` go with others of their own length: in a batch with shorter ones they would be
    computed at positions that the model does not have. Those without any room are in none.
    """
    rooms = [room(len(prompt), sampling) for prompt in prompts]
    in_order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    for most, group in groupby(in_order, key=rooms.__getitem__):
        numbers = list(group) if most > 0 else []
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size], most


def room(length: int, sampling: Sampling) -> int:
    """How many tokens a prompt of that length may be continued by."""
    return min(sampling.max_tokens, sampling.max_length - length) if sampling.max_length else sampling.max_tokens


class Rows:
    """Prompts that are continued at once. A row that has ended leaves when enough others have."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        sampling: Sampling,
        room: int,
        device: torch.device,
    ) -> None:
        self.prompts, self.keys, self.room, self.device = prompts, keys, room, device
        self.choice = Choice(sampling)
        self.stops = torch.tensor(sampling.stop, dtype=torch.long, device=device)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.log_probs: list[list[float]] = [[] for _ in prompts]

    def completed(self, module: Any) -> list[Completion]:
        """The completion of each prompt."""
        alive = list(range(len(self.prompts)))
        # What a model carries along as one state for all that it has read has no rows to choose from.
        leaving = 1.0 if getattr(module, "_is_stateful", False) else LEAVING
        given, mask, cache = self._begun(module, shares=leaving < 1)
        while alive:
            written = len(self.tokens[alive[0]])
            noted = Noted(self.choice, [self.keys[i] for i in alive], written, self.stops, leaving)
            made = _continued(module, given, mask, cache, self.room - written, noted)
            ended = self._keep(alive, noted)
            if written + len(noted.tokens) == self.room:
                break
            staying = [row for row, end in enumerate(ended) if not end]
            index = torch.tensor(staying, dtype=torch.long, device=self.device)
            alive = [alive[row] for row in staying]
            if alive:
                cache, given = made.past_key_values, made.sequences[index, -1:]
                cache.batch_select_indices(index)
                mask = torch.cat([mask[index], mask.new_ones(len(alive), len(noted.tokens))], 1)
        return [Completion(*both) for both in zip(self.tokens, self.log_probs, strict=True)]

    def _begun(self, module: Any, *, shares: bool) -> tuple[Tensor, Tensor, Any]:
        """Tokens that are still to be read, the mask of all, and the cache of those that were read.

        A prompt that several rows have is read once, but for its last token, whose logits each row needs.
        """
        unlike = list(dict.fromkeys(map(tuple, self.prompts)))
        tokens, mask = _left_padded(self.prompts, self.device)
        if not shares or len(unlike) == len(self.prompts) or min(map(len, unlike)) == 1:
            return tokens, mask, None
        once, once_mask = _left_padded([prompt[:-1] for prompt in unlike], self.device)
        cache = _continued(module, once, once_mask, None, 1).past_key_values
        place = {prompt: number for number, prompt in enumerate(unlike)}
        cache.batch_select_indices(torch.tensor([place[tuple(prompt)] for prompt in self.prompts], device=self.device))
        return tokens[:, -1:], mask, cache

    def _keep(self, alive: Sequence[int], noted: Noted) -> list[bool]:
        """Takes what was noted up to each row's end; says which rows have one."""
        tokens = torch.stack(noted.tokens, 1).tolist()
        log_probs = torch.stack(noted.log_probs, 1).tolist()
        stops = set(self.stops.tolist())
        ends = []
        for i, new, said in zip(alive, tokens, log_probs, strict=True):
            end = next((place + 1 for place, token in enumerate(new) if token in stops), None)
            self.tokens[i] += new[:end]
            self.log_probs[i] += said[:end]
            ends.append(end is not None)
        return ends


class Noted:
    """Chooses for transformers, which takes the largest score, and notes what was chosen; says when that is enough.

    tokens, log_probs: of each step, `(rows,)`.
    """

    def __init__(self, choice: Choice, keys: Sequence[int], written: int, stops: Tensor, leaving: float) -> None:
        self.choice, self.keys, self.written, self.stops = choice, keys, written, stops
        self.enough = max(1, int(len(keys) * leaving))
        self.ended = torch.zeros(len(keys), dtype=torch.bool, device=stops.device)
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As transformers calls a logits processor: `(rows, vocabulary)`."""
        places = [(key, self.written + len(self.tokens)) for key in self.keys]
        scores, tokens, log_probs = self.choice(scores, places)
        self.tokens.append(tokens)
        self.log_probs.append(log_probs)
        self.ended |= torch.isin(tokens, self.stops)
        return scores

    def stop(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """As transformers calls a stopping criterion: `(rows,)`, all alike."""
        return (self.ended.sum() >= self.enough).expand(len(self.ended))


def _continued(module: Any, tokens: Tensor, mask: Tensor, cache: Any, count: int, noted: Noted | None = None) -> Any:
    """transformers' own loop, from the tokens that the cache does not hold yet, for at most so many more."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    config = GenerationConfig(max_new_tokens=count, do_sample=False, use_cache=True, return_dict_in_generate=True)
    return module.generate(
        input_ids=tokens,
        attention_mask=mask,
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList([noted.process] if noted else []),
        stopping_criteria=StoppingCriteriaList([noted.stop] if noted else []),
    )


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`(rows, length)` tokens and mask. What pads is masked, so that any token will do."""
    length = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


@contextmanager
def _own_defaults(module: Any) -> Iterator[None]:
    """Sets aside the model's generation settings, which transformers mixes into ours (a repetition penalty, say)."""
    from transformers import GenerationConfig

    kept = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = kept
