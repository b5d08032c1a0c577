"""What is generated from is the same to the bit under every strategy, also where what computes is not fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from loomtune.catalogue import installed
from loomtune.contracts import EngineSpec
from loomtune.testing import toy
from loomtune.world import World
from ranks import together

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "zero 1": ("zero", {"stage": 1}),
    "zero 2": ("zero", {"stage": 2}),
    "zero 3": ("zero", {"stage": 3, "persist": 0}),
}
ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"rank": 4, "targets": ["all-linear"]}}
PROMPT = [[1, 40, 77, 130, 5, 200, 9, 33]]

Said = tuple[dict[str, str], Any, list[list[int]]]
"""Types by the parameters' names, logits, completions."""


def spec(model: Path, adapter: str, *, trained: bool) -> EngineSpec:
    build = installed().build
    return EngineSpec(
        model=build("model", "huggingface", {"path": str(model)}),
        adapter=build("adapter", adapter, ADAPTERS[adapter]),
        kernel=build("kernel", "sdpa", {}),
        optimizer=toy.ToyOptimizer() if trained else None,
        precision="bf16",
        seed=0,
    )


def said(model: Path, adapter: str, trained: bool) -> dict[str, Said]:
    """What each strategy's gathered module is made of and says, at the beginning of a run in bf16."""
    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    found = {}
    for name, (strategy, settings) in STRATEGIES.items():
        sharding = installed().build("sharding", strategy, settings)
        engine = sharding.engine(spec(model, adapter, trained=trained), world)
        with engine.gathered() as module:
            types = {key: str(parameter.dtype) for key, parameter in module.named_parameters()}
            logits = module(torch.tensor(PROMPT)).logits.float().numpy()
            tokens = module.generate(torch.tensor(PROMPT), max_new_tokens=8, do_sample=False)
        found[name] = types, logits, tokens.tolist()
        engine.close()
    return found


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        pytest.param("full", True, marks=pytest.mark.slow),
        ("lora", True),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "frozen"],
)
def test_in_bf16_every_strategy_generates_from_the_same_numbers(
    adapter: str, trained: bool, tied_model: Path, tmp_path: Path
) -> None:
    first, second = together(2, tmp_path, said, tied_model, adapter, trained)
    types, logits, tokens = first["single"]
    kept = {"full": {"torch.float32"}, "lora": {"torch.float32", "torch.bfloat16"}}[adapter]
    assert set(types.values()) == (kept if trained else {"torch.bfloat16"})
    for rank in (first, second):
        for name, (their_types, their_logits, their_tokens) in rank.items():
            assert their_types == types, name
            assert (their_logits == logits).all() and their_tokens == tokens, name
