"""Rows cut over ranks give the curve of one process, too."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune.errors import UserError
from runs.curves import LOSS, agree, largest
from runs.worlds import Outcome, Worlds
from support import write_rows

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ddp on 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "sharding.sequence=2"]),
    "fsdp on 2, recomputed": (
        2,
        ["sharding=fsdp", "sharding.sequence=2", "sharding.activation_checkpointing=true", "batch.micro=2"],
    ),
    "ddp on 2, micro-batches of 1": (2, ["sharding=ddp", "sharding.sequence=2", "batch.micro=1"]),
    "fsdp on 2 x 2": (4, ["sharding=fsdp", "sharding.sequence=2"]),
    "ddp on 2 x 2": (4, ["sharding=ddp", "sharding.sequence=2", "batch.micro=2"]),
    "fsdp on 1 x 4": (4, ["sharding=fsdp", "sharding.sequence=4"]),
    "hsdp on 2 x 1 x 2": (4, ["sharding=fsdp", "sharding.sequence=2", "sharding.replicate=2"]),
    "zero 1 on 2": (2, ["sharding=zero", "sharding.stage=1", "sharding.sequence=2", "batch.micro=2"]),
    "zero 2 on 2": (2, ["sharding=zero", "sharding.stage=2", "sharding.sequence=2"]),
    "zero 2 on 2, offloaded": (
        2,
        ["sharding=zero", "sharding.stage=2", "sharding.offload=optimizer", "sharding.sequence=2", "batch.micro=2"],
    ),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.persist=0", "sharding.sequence=2"]),
    "zero 3 on 2, recomputed": (
        2,
        [
            *("sharding=zero", "sharding.persist=0", "sharding.sequence=2", "batch.micro=2"),
            "sharding.activation_checkpointing=true",
        ],
    ),
    "zero 3 on 2 x 2": (4, ["sharding=zero", "sharding.persist=0", "sharding.sequence=2"]),
    "fsdp on 2 x 2 cuts": (4, ["sharding=fsdp", "sharding.sequence=2", "sharding.tensor=2"]),
}

Train = Callable[..., Outcome]
DROPOUT = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.1"]


def training_only(outcome: Outcome) -> list[dict[str, object]]:
    """Its steps without what evaluations measured."""
    steps = [line for line in outcome.lines if line["step"]]
    return [{k: v for k, v in line.items() if not k.startswith(("heldout", "sql"))} for line in steps]


def layouts(everyday: tuple[str, ...], *slow: str) -> pytest.MarkDecorator:
    """Some in the everyday suite, the others behind `-m slow`; without names, all others."""
    rest = [pytest.param(name, marks=pytest.mark.slow) for name in slow or LAYOUTS if name not in everyday]
    return pytest.mark.parametrize("layout", [*everyday, *rest])


@layouts(("ddp on 2", "zero 2 on 2", "zero 3 on 2"))
def test_rows_in_stretches_give_the_curve_of_one_process(
    layout: str, train: Train, alone: Train, tiny: list[str]
) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*tiny, "steps=40", *how]), alone(*tiny, "steps=40"))


@layouts(("fsdp on 2, recomputed",), *(name for name in LAYOUTS if "cuts" not in name))  # LoRA wraps what would be cut
def test_dropout_and_lora_draw_alike_in_stretches(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*tiny, *DROPOUT, "steps=40", *how]), alone(*tiny, *DROPOUT, "steps=40"))


@pytest.mark.slow
@layouts(("ddp on 2",), "fsdp on 2", "fsdp on 2 x 2", "zero 2 on 2", "zero 3 on 2")
def test_a_pretrained_model_learns_real_rows_in_stretches(
    layout: str, train: Train, alone: Train, real: list[str]
) -> None:
    size, how = LAYOUTS[layout]
    agree(train(size, [*real, "steps=40", *how]), alone(*real, "steps=40"))


def test_packed_rows_are_cut_too(train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS["ddp on 2"]
    agree(train(size, [*tiny, "steps=40", "packing=true", *how]), alone(*tiny, "steps=40"))


@pytest.fixture(scope="module")
def long(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run whose micro-batches have about as many targets as the head takes at once: some more, some less.

    In stretches, nearly all of them are predicted from the second one.
    """
    draw = random.Random(3)
    lengths = [(draw.randint(30, 60), draw.randint(2, 62)) for _ in range(200)]
    rows = [{"prompt": "p" * before, "completion": "".join(draw.choices("weft", k=n))} for before, n in lengths]
    path = write_rows(tmp_path_factory.mktemp("long") / "rows.jsonl", rows)
    others = [setting for setting in tiny if not setting.startswith("data.path")]
    return [*others, f"data.path={path}", "batch.size=64", "batch.micro=32", "steps=8"]


SEQUENCE, RECOMPUTED = "sharding.sequence=2", "sharding.activation_checkpointing=true"
UNEVEN = {
    "zero 3 in stretches": ["sharding=zero", "sharding.persist=0", SEQUENCE],
    "zero 3": ["sharding=zero", "sharding.persist=0"],
    "zero 3, recomputed": ["sharding=zero", "sharding.persist=0", SEQUENCE, RECOMPUTED],
    "fsdp": ["sharding=fsdp"],
    "fsdp in stretches": ["sharding=fsdp", SEQUENCE],
    "fsdp, recomputed": ["sharding=fsdp", SEQUENCE, RECOMPUTED],
}


@pytest.mark.parametrize(
    "how", [how if how == "zero 3 in stretches" else pytest.param(how, marks=pytest.mark.slow) for how in UNEVEN]
)
def test_some_ranks_may_need_the_head_more_often_than_others(
    how: str, train: Train, alone: Train, long: list[str]
) -> None:
    agree(train(2, [*long, *UNEVEN[how]]), alone(*long))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp on 2", "zero 2 on 2", "zero 3 on 2"])
def test_bf16_stays_near_bf16_on_one_process(layout: str, train: Train, alone: Train, tiny: list[str]) -> None:
    size, how = LAYOUTS[layout]
    settings = (*tiny, "steps=20", "precision=bf16")
    assert largest(train(size, [*settings, *how]).series("loss"), alone(*settings).series("loss")) < 5e-3


@pytest.mark.parametrize("how", ["ddp", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fsdp", "zero"))])
def test_an_evaluation_in_stretches_is_that_of_one_process_and_leaves_no_trace(
    how: str, train: Train, tiny: list[str]
) -> None:
    settings = [*tiny, *DROPOUT, "steps=6", "data.holdout_rows=5"]
    often = ["evaluator=[heldout]", "evaluate.every=2", "evaluate.before=true"]
    cut = [f"sharding={how}", "sharding.sequence=2"]
    measured = train(2, [*settings, *often, *cut], folder="measured")
    without = train(2, [*settings, *cut], folder="without")
    expected = train(1, [*settings, *often, "sharding=single"], folder="alone")
    assert largest(measured.series("heldout_loss"), expected.series("heldout_loss")) < LOSS
    trained = [
        {k: v for k, v in line.items() if not k.startswith("heldout")} for line in measured.lines if line["step"]
    ]
    assert trained == without.lines


@pytest.mark.parametrize("how", ["ddp", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fsdp", "zero"))])
def test_a_run_goes_on_from_stretches_on_one_process(
    how: str, worlds: Worlds, train: Train, alone: Train, tiny: list[str], tmp_path: Path
) -> None:
    cut = [f"sharding={how}", "sharding.sequence=2"]
    train(2, [*tiny, "steps=10", "stop_after=4", *cut], folder="cut")
    agree(worlds.resume(1, tmp_path / "cut", "sharding=single"), alone(*tiny, "steps=10"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "zero"])
def test_generation_in_the_midst_of_a_run_leaves_no_trace(how: str, train: Train) -> None:
    rows = ["data=sql_quiz", "data.train=64", "data.validation=8", "data.test=8", "batch.size=8", "steps=4"]
    settings = [*rows, *DROPOUT, f"sharding={how}", "sharding.sequence=2", "tracker=[jsonl]"]
    measured = train(2, settings, "evaluator=[sql_accuracy]", "evaluate.every=2", folder="measured")
    without = train(2, settings, "evaluator=[]", folder="without")
    assert len(measured.series("sql_accuracy")) == 2
    assert training_only(measured) == training_only(without)


def test_heads_that_cannot_be_dealt_out_are_refused_before_a_process_starts(train: Train, tiny: list[str]) -> None:
    with pytest.raises(UserError, match=r"(?s)4 attention heads.*set sharding\.sequence to 1 or 2 or 4"):
        train(3, [*tiny, "steps=1", "sharding=ddp", "sharding.sequence=3"])
