"""Whole runs that decay to where they began: one curve in every layout, and a start that checkpoints carry along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune import api
from loomtune.errors import UserError
from runs.curves import agree, largest
from runs.worlds import Outcome, Worlds

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ddp on 2": (2, ["sharding=ddp"]),
    "fsdp on 2": (2, ["sharding=fsdp"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "zero 1 on 2": (2, ["sharding=zero", "sharding.stage=1"]),
    "zero 2 on 2, offloaded": (2, ["sharding=zero", "sharding.stage=2", "sharding.offload=optimizer"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
    "zero 3 on 2, offloaded": (2, ["sharding=zero", "sharding.stage=3", "sharding.offload=all"]),
}
EVERYDAY = "zero 3 on 2"


@pytest.fixture(scope="module")
def settings(tied_model: Path, mixed_data: Path) -> list[str]:
    """Decay so strong that a start taken from anywhere else would show at once."""
    return [
        *(f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "optimizer.lr=1e-2", "batch.size=4"),
        *("steps=8", "tracker=[jsonl]"),
        *("checkpoint.background=false", "checkpoint.every=4"),
    ]


START = ("optimizer.weight_decay=5", "optimizer.decay_to=start")


@pytest.fixture(scope="module")
def alone(worlds: Worlds, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    made: dict[tuple[str, ...], Outcome] = {}

    def of(*more: str, decay: tuple[str, ...] = START) -> Outcome:
        more = (*more, *decay)
        if more not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[more] = worlds.train(1, [*settings, *more, "sharding=single"], folder)
        return made[more]

    return of


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == EVERYDAY else pytest.mark.slow) for name in LAYOUTS]
)
def test_one_curve_in_every_layout_and_when_a_run_moves_there_and_back(
    layout: str, worlds: Worlds, alone: Callable[..., Outcome], settings: list[str], tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    agree(worlds.train(size, [*settings, *START, *how], tmp_path / "whole"), alone())
    moved = worlds.train(1, [*settings, *START, "sharding=single", "stop_after=3"], tmp_path / "moved")
    moved = worlds.resume(size, moved.folder, *how, "stop_after=6")
    agree(worlds.resume(1, moved.folder, "sharding=single"), alone())


def test_a_run_goes_on_to_the_bit(
    worlds: Worlds, alone: Callable[..., Outcome], settings: list[str], tmp_path: Path
) -> None:
    stopped = worlds.train(1, [*settings, *START, "sharding=single", "stop_after=3"], tmp_path / "stopped")
    assert worlds.resume(1, stopped.folder, "sharding=single").lines == alone().lines


@pytest.mark.slow
def test_decay_to_the_start_is_not_decay_to_zero(alone: Callable[..., Outcome]) -> None:
    zero, free = (alone(decay=(f"optimizer.weight_decay={decay}",)) for decay in (5, 0))
    assert largest(alone().series("loss"), zero.series("loss")) > 1e-2
    assert largest(alone().series("loss"), free.series("loss")) > 1e-3


@pytest.mark.slow
def test_an_adapter_is_drawn_to_the_base(
    worlds: Worlds, alone: Callable[..., Outcome], settings: list[str], tmp_path: Path
) -> None:
    lora = ["adapter=lora", "adapter.rank=4"]
    held, free = alone(*lora), alone(*lora, decay=("optimizer.weight_decay=0",))
    assert largest(held.series("loss"), free.series("loss")) > 1e-4
    agree(worlds.train(2, [*settings, *lora, *START, "sharding=fsdp"], tmp_path / "run"), held)


def test_moments_of_8_bits_keep_no_start(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"decay_to"):
        api.compose([*settings, *START, "optimizer=adamw_8bit", "sharding=single"])
