"""Whole runs of distillation: one curve in every layout, and a teacher that is another model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune import api
from loomtune.errors import UserError
from runs.curves import agree, largest
from runs.worlds import Outcome, Worlds

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 3": (1, ["sharding=single", "batch.micro=3"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "fsdp on 2, recomputed": (2, ["sharding=fsdp", "sharding.activation_checkpointing=true"]),
    "zero 2 on 2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "batch.micro=2"]),
}
EVERYDAY = "fsdp on 2"


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tiny_model: Path, mixed_data: Path) -> list[str]:
    """A policy with a tied head, and a teacher without."""
    models = [f"model.path={tied_model}", f"roles.teacher.model.path={tiny_model}"]
    learned = ["objective=distill", "objective.temperature=0.9", "optimizer.lr=3e-3", "steps=4"]
    return [
        *models,
        "data=jsonl",
        f"data.path={mixed_data}",
        *learned,
        "tracker=[jsonl]",
        "checkpoint.background=false",
    ]


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
    if adapter == "lora" and "tensor" in layout:
        pytest.skip("linear layers that are wrapped are not cut")
    size, how = LAYOUTS[layout]
    one, other = alone(f"adapter={adapter}"), worlds.train(size, [*tiny, f"adapter={adapter}", *how], tmp_path / "run")
    agree(other, one)
    for name in ("kl", "entropy"):
        assert other.series(name) == pytest.approx(one.series(name), rel=1e-5), name


def test_the_policy_nears_its_teacher_which_the_checkpoint_leaves_out(alone: Callable[..., Outcome]) -> None:
    found = alone("adapter=full")
    assert found.series("kl")[-1] < found.series("kl")[0]
    assert found.series("entropy")[0] < math.log(300)
    names = {path.name for path in (found.folder / "checkpoints").rglob("*") if path.is_file()}
    assert not [name for name in names if "teacher" in name]


def test_a_teacher_with_another_tokenizer_is_refused(tiny: list[str], tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(tiny_model, other)
    file = other / "tokenizer.json"
    read = json.loads(file.read_text())
    words = list(read["model"]["vocab"])
    read["model"]["vocab"] = {word: number for number, word in enumerate(words[::-1])}
    file.write_text(json.dumps(read))
    given = [*tiny, "sharding=single", f"run.dir={tmp_path / 'run'}"]
    plan = api.compose([text if "teacher" not in text else f"roles.teacher.model.path={other}" for text in given])
    with pytest.raises(UserError, match=r"roles\.teacher\.model has another tokenizer"):
        api.prepare(plan)


@pytest.mark.slow
def test_bf16_stays_near_fp32_and_alike_under_fsdp(
    worlds: Worlds, alone: Callable[..., Outcome], tiny: list[str], tmp_path: Path
) -> None:
    exact, rounded = (alone("adapter=full", *more).series("loss") for more in ((), ("precision=bf16",)))
    other = worlds.train(2, [*tiny, "precision=bf16", "sharding=fsdp"], tmp_path / "run").series("loss")
    assert largest(rounded, exact) < 2e-2 and largest(other, rounded) < 1e-2
