"""Evaluations in the midst of a run: equal everywhere, without a trace in training, and what they decide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune import checkpoint, cli
from runs.curves import LOSS, largest
from runs.worlds import Outcome

Train = Callable[..., Outcome]

HELD_OUT = ["data.holdout_rows=5"]
MEASURED = [*HELD_OUT, "evaluator=[heldout]"]


def training_only(outcome: Outcome) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if not key.startswith("heldout")} for line in outcome.lines]


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.dropout=0.1"]], ids=["full", "lora with dropout"])
def test_an_evaluation_leaves_no_trace_in_training(adapter: list[str], tiny: list[str], train: Train) -> None:
    settings = [*tiny, *adapter, "sharding=fsdp", "steps=8"]
    measured = train(2, settings, *MEASURED, "evaluate.every=2", "evaluate.before=true", folder="measured")
    without = train(2, settings, *HELD_OUT, folder="without")
    assert [line["step"] for line in measured.lines if "heldout_loss" in line] == [2, 4, 6, 8]
    assert [line for line in training_only(measured) if line["step"]] == without.lines


def test_the_held_out_loss_is_the_same_everywhere(tiny: list[str], train: Train) -> None:
    settings = [*tiny, *MEASURED, "evaluate.every=3", "steps=9"]
    alone = train(1, settings, "sharding=single", folder="alone").series("heldout_loss")
    assert len(alone) == 3
    for size, how in ((2, "sharding=ddp"), (3, "sharding=fsdp"), (1, "batch.micro=1")):
        found = train(size, settings, how, folder=f"{how} on {size}").series("heldout_loss")
        assert largest(found, alone) < LOSS, (size, how)


def test_the_best_checkpoint_stays_and_patience_ends_the_run(tiny: list[str], train: Train) -> None:
    worse = [*tiny, "optimizer.lr=0.3", "schedule=constant", "steps=40", "sharding=fsdp"]
    worse.remove("optimizer.lr=1e-3")
    deciding = ["evaluate.every=1", "evaluate.best=heldout_loss", "evaluate.patience=3", "checkpoint.keep=1"]
    run = train(2, worse, *MEASURED, *deciding)
    losses = run.series("heldout_loss")
    best = losses.index(min(losses)) + 1
    assert run.result["status"] == "stopped"
    assert len(losses) == run.result["step"] == best + 3 < 40
    marked = checkpoint.best(run.folder / "checkpoints")
    assert marked is not None and checkpoint.step_of(marked) == best
    latest = checkpoint.latest(run.folder / "checkpoints")
    assert latest is not None and checkpoint.step_of(latest) == run.result["step"]


def test_a_run_is_measured_again_and_built_upon(
    tiny: list[str], train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = train(2, [*tiny, *MEASURED], "sharding=fsdp", "steps=6", folder="first")
    (last,) = first.series("heldout_loss")
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(first.folder)])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["heldout_loss"] == pytest.approx(last, rel=LOSS)

    on_top = [f"model.path={first.folder}", *tiny[1:], *MEASURED, "evaluate.before=true"]
    second = train(1, on_top, "sharding=single", "steps=1", folder="second")
    assert second.series("heldout_loss_before") == pytest.approx([last], rel=LOSS)
