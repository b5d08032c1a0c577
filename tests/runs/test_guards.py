"""Steps that would ruin the model: every rank leaves them out alike."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from runs.curves import largest
from runs.worlds import Failed, Outcome
from support import mixed_rows, write_rows

Train = Callable[..., Outcome]

POISON = "~"


@pytest.fixture(scope="module")
def poisoned(tiny_model: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One row of many holds a letter whose embedding is no number, so one step of the run has no loss."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(tiny_model, folder)
    (letter,) = AutoTokenizer.from_pretrained(folder)(POISON, add_special_tokens=False)["input_ids"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][letter] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = mixed_rows(48)
    rows[20]["prompt"] = POISON + rows[20]["prompt"]
    data = write_rows(folder.parent / "rows.jsonl", rows)
    return [f"model.path={folder}", "data=jsonl", f"data.path={data}", *tiny[3:], "steps=6"]


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(poisoned: list[str], train: Train) -> None:
    alone = train(1, poisoned, "sharding=single", folder="alone")
    skipped = [line["step"] for line in alone.lines if line["loss"] is None]
    assert len(skipped) == 1 and skipped[0] < 6, "one step is poisoned, and others come after it"
    for size, how in ((2, "sharding=ddp"), (3, "sharding=fsdp"), (2, "sharding=zero")):
        run = train(size, poisoned, how, folder=how)
        assert [line["step"] for line in run.lines if line["loss"] is None] == skipped
        finite = [[value for value in outcome.series("loss") if value is not None] for outcome in (run, alone)]
        assert largest(*finite) < 2e-6


def test_too_many_such_steps_end_the_run_on_all_ranks(tiny: list[str], train: Train) -> None:
    ruinous = [*tiny, "schedule=constant", "optimizer.lr=1e30", "guard=[finite]", "guard.finite.patience=2", "steps=20"]
    ruinous.remove("optimizer.lr=1e-3")
    with pytest.raises(Failed) as failed:
        train(2, ruinous, "sharding=fsdp")
    assert [name for name, _ in failed.value.errors] == ["RunFailed"] * 2
    assert all("3 steps in a row were not finite" in message for _, message in failed.value.errors)
