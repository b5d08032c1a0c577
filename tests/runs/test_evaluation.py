"""Evaluations in the midst of a run: equal everywhere, without a trace in training, and what they decide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import parity
from loomtune import api, checkpoint, cli
from runs.curves import LOSS, largest
from runs.ranks import on_ranks
from runs.sampling import both
from runs.worlds import Outcome, Worlds

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


SHORT_OF_ROWS = {
    "fsdp on 4": (4, "sharding=fsdp", ""),
    "fsdp on 4, bf16": (4, "sharding=fsdp", "precision=bf16"),
    "fsdp without resharding on 4": (4, "sharding=fsdp sharding.reshard=false", ""),
    "hsdp on 2 x 2": (4, "sharding=fsdp sharding.replicate=2", ""),
    "zero 1 on 4, bf16": (4, "sharding=zero sharding.stage=1", "precision=bf16"),
    "zero 3 on 4": (4, "sharding=zero sharding.stage=3", ""),
    "zero 3 on 4, bf16": (4, "sharding=zero sharding.stage=3", "precision=bf16"),
    "fsdp, tensor 2, on 4": (4, "sharding=fsdp sharding.tensor=2", ""),
    "fsdp, sequence 2, on 4": (4, "sharding=fsdp sharding.sequence=2", ""),
}
GENERATED = ["recipe=null", "data=sql_quiz", "data.train=64", "data.validation=5", "data.test=5", "max_length=128"]
"""Five rows to measure on: of four ranks, one has two and the others one."""

GENERATES = ["evaluator=[heldout,sql_accuracy]", "evaluator.sql_accuracy.max_tokens=6", "rollout=huggingface"]
EVERYDAY = ["fsdp on 4", "zero 3 on 4"]


def kept(outcome: Outcome) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights and the optimizer's state."""
    last = checkpoint.latest(outcome.folder / "checkpoints")
    assert last is not None
    return {
        f"{path.relative_to(last)}: {name}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow) for name in SHORT_OF_ROWS]
)
@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "packed"])
def test_measuring_and_generating_with_ranks_short_of_rows_leave_no_trace(
    layout: str, packing: bool, train: Train
) -> None:
    size, how, precision = SHORT_OF_ROWS[layout]
    if reason := parity.lacking(how):
        pytest.skip(reason)
    settings = [
        *GENERATED,
        *how.split(),
        *precision.split(),
        f"packing={packing}",
        "optimizer.lr=1e-3",
        "steps=4",
        "tracker=[jsonl]",
    ]
    measured = train(size, [*settings, *GENERATES, "evaluate.every=2", "evaluate.before=true"], folder="measured")
    without = train(size, settings, folder="without")
    lines = [line for line in training_only(measured) if line["step"]]
    assert [line["step"] for line in measured.lines if "sql_accuracy" in line] == [2, 4], "it was generated"
    assert [{k: v for k, v in line.items() if not k.startswith("sql")} for line in lines] == without.lines
    left, expected = kept(measured), kept(without)
    assert left.keys() == expected.keys() and len(expected) > 100
    assert all(torch.equal(left[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "how",
    [
        ["sharding=fsdp"],
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in (
                ["sharding=fsdp", "sharding.reshard=false"],
                ["sharding=fsdp", "precision=bf16"],
                ["sharding=ddp"],
                ["sharding=zero", "sharding.stage=1", "precision=bf16"],
                ["sharding=zero", "sharding.stage=3"],
            )
        ),
    ],
    ids=" ".join,
)
def test_drawing_completions_leaves_no_trace_though_a_rank_has_no_prompt(
    how: list[str], tiny: list[str], tmp_path: Path
) -> None:
    if reason := parity.lacking(" ".join(one for one in how if one.startswith("sharding"))):
        pytest.skip(reason)
    dropout = ["adapter=lora", "adapter.dropout=0.1", "rollout=huggingface", "steps=4"]
    folders = []
    for name, more in (("drawing", [*MEASURED, "evaluate.every=1"]), ("silent", HELD_OUT)):
        plan = api.compose([*tiny, *how, *dropout, *more, f"run.dir='{tmp_path / name}'"], processes=2)
        api.check(plan)
        folders.append(api.prepare(plan))
    (drawn, (left, expected)), (elsewhere, _) = on_ranks(2, both, *folders)
    assert drawn == elsewhere and len(drawn) == 4, "ranks know all completions, of every evaluation"
    assert any(one != drawn[0] for one in drawn), "each is drawn anew"
    assert left.keys() == expected.keys() and all((left[name] == value).all() for name, value in expected.items())


@pytest.fixture(scope="module")
def held_out_alone(tiny: list[str], worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The held-out losses of one process."""
    settings = [*tiny, *MEASURED, "evaluate.every=3", "steps=9", "sharding=single"]
    return worlds.train(1, settings, tmp_path_factory.mktemp("alone") / "run").series("heldout_loss")


LAID_OUT = [layout for layout in parity.LAYOUTS if layout.name not in ("single", "ddp", "fsdp")]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(one, marks=[] if one.name == "zero 3" else pytest.mark.slow, id=one.name) for one in LAID_OUT],
)
def test_the_held_out_loss_is_the_same_in_every_layout(
    layout: parity.Layout, held_out_alone: list[float], tiny: list[str], train: Train
) -> None:
    if reason := parity.lacking(layout.settings):
        pytest.skip(reason)
    settings = [*tiny, *MEASURED, "evaluate.every=3", "steps=9", *layout.settings.split()]
    found = train(layout.smallest, settings).series("heldout_loss")
    assert largest(found, held_out_alone) < LOSS


def test_the_held_out_loss_is_the_same_everywhere(tiny: list[str], train: Train) -> None:
    settings = [*tiny, *MEASURED, "evaluate.every=3", "steps=9"]
    alone = train(1, settings, "sharding=single", folder="alone").series("heldout_loss")
    assert len(alone) == 3
    sharing_rows = [(2, "sharding=fsdp sharding.tensor=2"), (2, "sharding=fsdp sharding.sequence=2")]
    for size, how in ((2, "sharding=ddp"), (3, "sharding=fsdp"), (1, "batch.micro=1"), *sharing_rows):
        found = train(size, settings, *how.split(), folder=f"{how} on {size}").series("heldout_loss")
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
