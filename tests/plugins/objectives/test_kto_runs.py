"""Whole runs of KTO: one curve in every layout, with a z0 that no layout changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runs.curves import largest
from runs.worlds import Outcome, Worlds
from support import write_rows

LOSS, NORM = 1e-4, 1e-5
"""Log-probabilities of whole answers are summed, and of two such sums the difference counts: there the loss cancels."""

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 3, unfolded": (1, ["sharding=single", "batch.micro=3", "batch.share=never"]),
    "shared": (1, ["sharding=single", "batch.share=always"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp on 2, shared": (2, ["sharding=fsdp", "batch.share=always"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
}
EVERYDAY = "fsdp on 2"


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = [
        {"prompt": "p" * (3 + i % 5), "completion": "ab" * (1 + i % 7) + chr(97 + i % 26), "label": i % 3 > 0}
        for i in range(38)
    ]
    path = write_rows(tmp_path_factory.mktemp("kto") / "rows.jsonl", rows)
    data = [f"model.path={tied_model}", "data=jsonl", f"data.path={path}", "data.holdout_rows=6"]
    learned = ["objective=kto", "objective.beta=0.5", "objective.undesirable=1.5", "optimizer.lr=3e-3"]
    return [*data, *learned, "evaluator=[heldout]", "steps=4", "tracker=[jsonl]", "checkpoint.background=false"]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    made: dict[tuple[str, ...], Outcome] = {}

    def of(*settings: str) -> Outcome:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*tiny, *settings, "sharding=single"], folder)
        return made[settings]

    return of


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == EVERYDAY else pytest.mark.slow) for name in LAYOUTS]
)
@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_one_curve_in_every_layout(
    layout: str, adapter: str, worlds: Worlds, alone: Callable[..., Outcome], tiny: list[str], tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    one, other = alone(f"adapter={adapter}"), worlds.train(size, [*tiny, f"adapter={adapter}", *how], tmp_path / "run")
    assert largest(other.series("loss"), one.series("loss")) < LOSS
    assert largest(other.series("grad_norm"), one.series("grad_norm")) < NORM
    assert largest(other.series("logps/chosen"), one.series("logps/chosen")) < 2e-6
    assert other.series("kl") == pytest.approx(one.series("kl"), rel=1e-4, abs=1e-5) and max(one.series("kl")) > 0.01
    for name in ("heldout_loss", "heldout_kl", "heldout_rewards/margins"):
        assert other.result["metrics"][name] == pytest.approx(one.result["metrics"][name], rel=1e-4, abs=1e-5), name


def test_wanted_answers_become_likelier_than_the_others(alone: Callable[..., Outcome]) -> None:
    margins = alone("adapter=full").series("rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-5) and margins[-1] > 0.1


@pytest.mark.slow
def test_the_last_step_of_an_epoch_may_be_of_one_row(worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    short = [*tiny, "data.limit=9", "steps=0", "batch.size=8", "data.holdout_rows=0", "evaluator=[]"]
    named = {setting.partition("=")[0]: setting for setting in short}
    found = worlds.train(1, [*named.values(), "sharding=single"], tmp_path / "run")
    assert len(found.series("loss")) == 2 and found.series("kl")[-1] == 0.0
