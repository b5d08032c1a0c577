from pathlib import Path
from typing import Any

import pytest
from checkpoint_fakes import FakeEngine, equal, network, save

from loomtune.checkpoint import Reader, best, latest, mark_best
from loomtune.checkpoint import folder as module
from loomtune.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_newest_stay_and_the_rest_goes(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    assert (tmp_path / "LATEST").read_text() == "step-00000040\n"


def test_the_best_stays_beside_those_that_are_kept(tmp_path: Path) -> None:
    mark_best(tmp_path, save(tmp_path, 10).name)
    for step in (20, 30, 40):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000030", "step-00000040"]
    assert best(tmp_path) == tmp_path / "step-00000010"


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20) / "manifest.json").unlink()
    save(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]


def test_what_is_later_than_the_newest_is_left_alone(tmp_path: Path) -> None:
    for step in (20, 30):
        save(tmp_path, step, keep=2)
    for step in (10, 15):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]


def test_after_a_roll_back_the_run_goes_on_from_what_was_saved_last(tmp_path: Path) -> None:
    save(tmp_path, 30)
    assert latest(tmp_path) == tmp_path / "step-00000030"
    save(tmp_path, 20)
    assert latest(tmp_path) == tmp_path / "step-00000020"


def test_a_step_saved_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    save(tmp_path, 10, FakeEngine(network(1)))
    path = save(tmp_path, 10, FakeEngine(network(2)))
    assert equal(FakeEngine(network()).read(Reader(path).read("policy")), network(2))
    assert names(tmp_path) == ["step-00000010"]


def test_one_that_stepped_aside_counts_until_its_successor_has_the_name(tmp_path: Path, capsys: Any) -> None:
    path = save(tmp_path, 10)
    path.rename(tmp_path / "step-00000010.old")
    assert latest(tmp_path) == tmp_path / "step-00000010.old"
    save(tmp_path, 20, keep=2)
    assert names(tmp_path) == ["step-00000010.old", "step-00000020"]
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_leftovers_of_killed_attempts_are_cleared_at_the_next_commit(tmp_path: Path) -> None:
    for name in ("step-00000005.tmp-a0-1", ".trash-0123abcd"):
        (tmp_path / name / "model").mkdir(parents=True)
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010"]


@pytest.mark.parametrize("content", ["", "../elsewhere", "step-00000099", "step-00000020.tmp-a-1"])
def test_a_pointer_that_names_nothing_is_passed_over(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, 10)
    (tmp_path / "LATEST").write_text(content)
    assert latest(tmp_path) == path


def test_a_folder_without_checkpoints_has_no_latest_and_no_best(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    assert best(tmp_path / "none") is None


def test_only_a_valid_checkpoint_can_be_the_best(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        mark_best(tmp_path, "step-00000001")


def test_a_checkpoint_is_committed_even_where_the_old_cannot_be_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stuck(path: Path) -> None:
        raise PermissionError("Operation not permitted")

    save(tmp_path, 10)
    monkeypatch.setattr(module, "_discard", stuck)
    assert save(tmp_path, 20, keep=1) == latest(tmp_path)
    assert "could not be removed" in capsys.readouterr().err
