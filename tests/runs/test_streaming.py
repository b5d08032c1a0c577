"""Whole runs over rows that stream: on any number of processes, killed, moved, and refused before they begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune import api
from loomtune.errors import UserError
from runs.curves import agree
from runs.processes import COMMAND, kill_all, started, wait_for_step
from runs.worlds import Failed, Outcome, Worlds
from support import write_rows

Train = Callable[..., Outcome]

STEPS = 12
"""Of 8 rows: 61 rows in windows of 16 are in their second epoch."""


@pytest.fixture(scope="module")
def streamed(tiny: list[str]) -> list[str]:
    """The tiny run over windows of its rows."""
    return [*tiny, f"steps={STEPS}", "batch.size=8", "data.stream=true", "data.window=16"]


@pytest.fixture(scope="module")
def still(worlds: Worlds, streamed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """That run on one process, left alone."""
    return worlds.train(1, [*streamed, "sharding=single"], tmp_path_factory.mktemp("still") / "run")


def test_two_processes_learn_from_the_rows_that_one_does(train: Train, streamed: list[str], still: Outcome) -> None:
    two = train(2, streamed, "sharding=ddp")
    agree(two, still)
    assert len(set(two.series("loss"))) == STEPS
    assert not (two.folder / "stream").exists(), "windows are gone with the run"


def test_a_run_that_stops_within_a_window_goes_on_elsewhere_at_the_very_row(
    train: Train, worlds: Worlds, streamed: list[str], still: Outcome
) -> None:
    stopped = train(2, streamed, "sharding=ddp", "stop_after=5")
    assert stopped.result["status"] == "stopped"
    moved = worlds.resume(1, stopped.folder, "sharding=single")
    assert [line["step"] for line in moved.lines] == [*range(1, STEPS + 1)]
    agree(moved, still)


def test_a_window_that_holds_all_rows_is_the_run_over_a_split(train: Train, tiny: list[str]) -> None:
    plain = [*tiny, "steps=10", "batch.size=8", "sharding=single"]
    whole = train(1, plain, folder="whole")
    assert train(1, plain, "data.stream=true", "data.window=61", folder="streamed").lines == whole.lines


def test_bad_rows_end_a_run_on_all_ranks_with_the_same_words(train: Train, tiny: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}", "completion": "yes"} for number in range(30)] + [{"prompt": "no answer"}] * 4
    path = write_rows(tmp_path / "bad.jsonl", rows)
    settings = [*(text for text in tiny if "data.path" not in text), f"data.path={path}", "steps=6", "batch.size=8"]
    with pytest.raises(Failed) as failed:
        train(2, settings, "sharding=ddp", "data.stream=true", "data.window=20")
    (name, message), other = failed.value.errors
    assert (name, message) == other and name == "UserError"
    assert "4 of 14 rows of split train cannot be learned from:\n  bad.jsonl:31: " in message


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_is_killed_goes_on_with_another_number_of_processes(
    size: int, worlds: Worlds, streamed: list[str], tmp_path: Path
) -> None:
    settings = [*(text for text in streamed if "steps" not in text), "steps=60", "checkpoint.every=3"]
    uninterrupted = worlds.train(1, [*settings, "sharding=single"], tmp_path / "still")
    folder, how = tmp_path / "killed", "sharding=ddp" if size > 1 else "sharding=single"
    command = [*COMMAND, "train", *settings, how, f"launcher.procs={size}", f"run.dir={folder}"]
    with started(command, tmp_path / "log") as process:
        wait_for_step(folder, 20, process)
        kill_all(process)
    assert not (folder / "result.json").exists(), "killed in the midst of it"
    other = 3 - size
    resumed = worlds.resume(other, folder, "sharding=ddp" if other > 1 else "sharding=single")
    assert [line["step"] for line in resumed.lines] == [*range(1, 61)]
    agree(resumed, uninterrupted)


def test_files_that_changed_since_are_no_place_to_go_on(tiny: list[str], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "completion": "yes"} for n in range(40)])
    settings = [*(text for text in tiny if "data.path" not in text), f"data.path={path}", "steps=6"]
    plan = api.compose([*settings, "data.stream=true", "data.window=16", f"run.dir={tmp_path / 'run'}"], processes=1)
    assert api.prepare(plan) == api.prepare(plan)
    write_rows(path, [{"prompt": f"{n}", "completion": "yes"} for n in range(41)])
    with pytest.raises(UserError, match="began from other files of data: they were changed since"):
        api.prepare(plan)


def test_what_needs_the_whole_split_is_refused_all_at_once(tiny: list[str]) -> None:
    asked = ["data.stream=true", "batch.sampler=packed", "evaluator=[heldout]", "evaluator.heldout.split=train"]
    with pytest.raises(UserError) as error:
        api.check(api.compose([*tiny, *asked], processes=1))
    said = str(error.value)
    assert "how long an epoch is is not known\n    cure: set steps=" in said
    assert "batch.sampler=packed" in said
    assert "evaluator=heldout measures on train" in said and "evaluator.heldout.split" in said


@pytest.mark.slow
def test_a_reference_is_read_live_unless_it_is_to_be_stored(tiny: list[str], train: Train, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "yes" * (n % 3 + 1), "rejected": "no"} for n in range(20)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    settings = [*(text for text in tiny if "data.path" not in text), f"data.path={path}", "objective=dpo", "steps=4"]
    stored = [*settings, "data.stream=true", "objective.reference=stored"]
    with pytest.raises(UserError, match="what the reference says of every row is to be stored"):
        api.check(api.compose(stored, processes=1))
    live = train(1, settings, "objective.reference=live", "sharding=single", folder="live")
    assert train(1, settings, "data.stream=true", "data.window=20", "sharding=single").lines == live.lines
