"""QLoRA under every strategy: the curve of one process, in training and in evaluation, and the same bytes gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Batch, EngineSpec, Role
from loomtune.toolkit import log_probs
from loomtune.world import World
from ranks import together
from toys import sample

pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp offload": ("fsdp", {"offload": True}),
    "hsdp": ("fsdp", {"replicate": 2}),
    "zero 1": ("zero", {"stage": 1}),
    "zero 2": ("zero", {"stage": 2}),
    "zero 3": ("zero", {"stage": 3, "persist": 0}),
}
TEXTS = ("warp", "a weft", "the heddle", "reed", "of a shuttle", "loom", "bobbin", "selvage")
STEPS = 6
Said = tuple[list[float], list[float], dict[str, bytes], Any]
"""Losses and norms of each step, bytes of the packed base as gathered, logits of the gathered module."""


def spec(model: Path, precision: str, settings: dict[str, Any]) -> EngineSpec:
    build = installed().build
    return EngineSpec(
        model=build("model", "huggingface", {"path": str(model)}),
        adapter=build("adapter", "qlora", {"rank": 4, **settings}),
        kernel=build("kernel", "sdpa", {}),
        optimizer=build("optimizer", "adamw", {"lr": 1e-2}),
        precision=precision,
        seed=0,
    )


def rows(rank: int, size: int) -> Batch:
    mine = TEXTS[rank::size]
    return collate([sample(text) for text in mine], range(len(mine)), 0)


def summed(value: float, world: World) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(total)
    return float(total)


def curve(strategy: str, settings: dict[str, Any], made: EngineSpec, world: World) -> Said:
    """Trains a few steps, with an evaluation after each that must see what training sees."""
    engine = installed().build("sharding", strategy, settings).engine(made, world)
    batch, role, losses, norms = rows(world.rank, world.size), Role("policy", engine), [], []
    for _ in range(STEPS):
        with engine.evaluating():
            evaluated = summed(float(-log_probs(role, batch).sum() / 50), world)
        with engine.accumulating(last=True):
            loss = -log_probs(role, batch).sum() / 50
            engine.backward(loss)
        losses += [evaluated, summed(float(loss.detach()), world)]
        norms.append(engine.step(1e-2, 1.0, lambda norm: True))
    with engine.gathered() as module:
        held = {name: p.numpy().tobytes() for name, p in module.named_parameters() if p.dtype == torch.uint8}
        logits = module(torch.tensor([[1, 40, 77, 130]])).logits.float().numpy()
    engine.close()
    return losses, norms, held, logits


def alone(model: Path, precision: str, settings: dict[str, Any]) -> Said:
    return curve("single", {}, spec(model, precision, settings), World(0, 1, 0, torch.device("cpu")))


def said(model: Path, precision: str, settings: dict[str, Any], names: list[str]) -> dict[str, Said]:
    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    return {name: curve(*STRATEGIES[name], spec(model, precision, settings), world) for name in names}


WAYS = {
    "nf4": ("fp32", {}, list(STRATEGIES)),
    "dora": ("fp32", {"dora": True, "double_quant": False, "targets": ["q_proj", "mlp.*"]}, list(STRATEGIES)),
    "bf16": ("bf16", {}, list(STRATEGIES)),
    "some": ("fp32", {}, ["fsdp", "zero 3"]),
}
BOUNDS = {"fp32": (5e-6, 5e-6), "bf16": (3e-3, 5e-2)}
"""Of losses and norms, relative: rows meet in other micro-batches, and in bf16 every sum rounds otherwise."""


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way == "some" else pytest.mark.slow) for way in ("some", "nf4", "dora", "bf16")],
)
def test_every_strategy_gives_the_curve_of_one_process_in_training_and_in_evaluation(
    way: str, tiny_model: Path, tmp_path: Path
) -> None:
    precision, settings, names = WAYS[way]
    losses, norms, held, logits = alone(tiny_model, precision, settings)
    most, most_of_norms = BOUNDS[precision]
    first, second = together(2, tmp_path, said, tiny_model, precision, settings, names)
    assert len(held) == (14 * (2 if way == "dora" else 3))
    assert losses[0::2] == losses[1::2], "evaluation sees what training sees"
    for rank in (first, second):
        for name, (theirs, their_norms, their_bytes, their_logits) in rank.items():
            assert theirs == pytest.approx(losses, rel=most), name
            assert theirs[0::2] == pytest.approx(theirs[1::2], rel=1e-7), name
            assert their_norms == pytest.approx(norms, rel=most_of_norms), name
            assert their_bytes == held, name
            assert abs(their_logits - logits).max() < (0.3 if precision == "bf16" else 1e-4), name
