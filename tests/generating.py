"""A small model to generate from, engines that do it, and what is asked of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune.catalogue import installed
from loomtune.contracts import Completion, Role, Sampling
from loomtune.world import World

VOCABULARY = 13
STOP = 8


class Engine:
    """What generation asks of an engine; counts that every entered context was left."""

    def __init__(self, module: LlamaForCausalLM, dtype: torch.dtype | None = None) -> None:
        self.module, self.dtype, self.inside, self.entered = module, dtype, 0, []

    @contextmanager
    def _within(self, name: str) -> Iterator[LlamaForCausalLM]:
        self.entered.append(name)
        self.inside += 1
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            yield self.module
        self.inside -= 1

    def evaluating(self):
        return self._within("evaluating")

    def gathered(self):
        return self._within("gathered")


def drawn_llama() -> LlamaForCausalLM:
    """One that is rather sure of itself, and whose own settings of generation would spoil everything."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(8)
    made.generation_config.repetition_penalty = 5.0
    made.generation_config.forced_eos_token_id = 5
    return made.train()


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, 0, torch.device("cpu"), replica=rank, replicas=size)


def completed(
    name: str,
    module: Any,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[int] = (),
    where: World | None = None,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    **sampling: Any,
) -> list[Completion]:
    """What an engine of that name makes of the prompts, whose keys are their numbers unless said otherwise."""
    role = Role("policy", Engine(module, dtype))  # type: ignore[arg-type]
    wanted = Sampling(**{"max_tokens": 8, "stop": (STOP,)} | sampling)
    rollout = installed().build("rollout", name, settings or {})
    return rollout.generate(role, prompts, keys or range(len(prompts)), wanted, where or world())


def generate(*asked: Any, **how: Any) -> list[list[int]]:
    """The tokens alone."""
    return [list(one.tokens) for one in completed(*asked, **how)]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
