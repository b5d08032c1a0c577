"""What an engine says of the tokens that it drew is what training says of them, in either type of computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import EngineSpec, Role, Sample, Sampling, Segment
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from ranks import together

FARTHEST = {"fp32": 2e-5, "bf16": 0.08}
MEAN = {"fp32": 2e-6, "bf16": 0.008}
"""Between log-probabilities, in nats: of any token, and on average. Half a unit of bf16 in a logit of 8 is 0.016."""

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "zero 2": ("zero", {"stage": 2}),
    "zero 3": ("zero", {"stage": 3, "persist": 0}),
}
ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"rank": 4, "targets": ["all-linear"]}}
VIRTUAL: dict[str, dict[str, Any]] = {"prompt": {"length": 4}, "prefix": {"length": 4}}
TEMPERATURE = 0.8


def differences(
    world: World, model: Path, adapter: str, precision: str, strategy: str, settings: dict[str, Any], engine: str
) -> tuple[float, float]:
    """The largest, and the mean of all, between a rollout's and training's log-probabilities."""
    build = installed().build
    spec = EngineSpec(
        model=build("model", "huggingface", {"path": str(model)}),
        adapter=build("adapter", adapter, (ADAPTERS | VIRTUAL)[adapter]),
        kernel=build("kernel", "sdpa", {}),
        optimizer=toy.ToyOptimizer(),
        precision=precision,
        seed=0,
    )
    policy = Role("policy", build("sharding", strategy, settings).engine(spec, world))
    prompts = [[1, *range(40, 40 + 3 * length)] for length in (1, 2, 3, 4, 4, 6, 6, 6)]
    sampling = Sampling(max_tokens=24, temperature=TEMPERATURE, stop=(*range(20),))
    found = build("rollout", engine, {}).generate(policy, prompts, range(8), sampling, world)
    batch = collate([answered(prompt, one.tokens) for prompt, one in zip(prompts, found, strict=True)], range(8), 0)
    with torch.no_grad(), policy.engine.evaluating():
        training = log_probs(policy, batch, temperature=TEMPERATURE)
    said = torch.tensor([value for one in found for value in one.log_probs])
    far = (training.float() - said).abs()
    policy.engine.close()
    return float(far.max()), float(far.mean())


def answered(prompt: list[int], tokens: Any) -> Sample:
    learned = np.array([False] * len(prompt) + [True] * len(tokens))
    return Sample((Segment(np.array([*prompt, *tokens], np.int32), learned),), {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("engine", ["huggingface", "continuous"])
def test_on_one_process(engine: str, adapter: str, precision: str, tied_model: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    farthest, mean = differences(world, tied_model, adapter, precision, "single", {}, engine)
    print(f"{farthest:.1e} {mean:.1e}")
    assert farthest < FARTHEST[precision] and mean < MEAN[precision]
    assert precision == "fp32" or mean > 1e-5, "otherwise neither computes in bf16"


@pytest.mark.parametrize("adapter", VIRTUAL)
def test_of_what_an_adapter_leads(adapter: str, tied_model: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    farthest, _ = differences(world, tied_model, adapter, "fp32", "single", {}, "huggingface")
    assert farthest < FARTHEST["fp32"]


def everywhere(model: Path, adapter: str) -> dict[tuple[str, str, str], tuple[float, float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, 0, torch.device("cpu"), dist.group.WORLD, replica=rank, replicas=size)
    return {
        (engine, name, precision): differences(world, model, adapter, precision, *STRATEGIES[name], engine)
        for engine in ("huggingface", "continuous")
        for name in STRATEGIES
        for precision in ("fp32", "bf16")
    }


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_on_two_under_every_strategy(adapter: str, tied_model: Path, tmp_path: Path) -> None:
    for rank in together(2, tmp_path, everywhere, tied_model, adapter):
        print({key: [f"{far:.1e}" for far in found] for key, found in rank.items()})
        for (engine, name, precision), (farthest, mean) in rank.items():
            assert farthest < FARTHEST[precision] and mean < MEAN[precision], (engine, name, precision)
