"""Of several ranks that failed, the one whose failure the others merely noticed is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loomtune_launchers.watching import failures, ranklogs

NOW = 1_800_000_000.0


def left(attempt: Path, rank: int, message: str, when: float, host: str = "") -> None:
    """An error file as torch's ErrorHandler writes it: whole seconds."""
    extra = {"py_callstack": f"Traceback of {rank}\n  line\n{message}", "timestamp": str(int(when))}
    folder = attempt / str(rank)
    folder.mkdir(parents=True)
    said = {"message": {"message": message, "extraInfo": extra | ({"host": host} if host else {})}}
    (folder / "error.json").write_text(json.dumps(said))
    os.utime(folder / "error.json", (when, when))


def test_within_a_second_the_file_s_own_time_decides(tmp_path: Path) -> None:
    left(tmp_path, 0, "ConnectionError", NOW + 0.3)
    left(tmp_path, 10, "ValueError: torn", NOW + 0.1, "node2")
    left(tmp_path, 2, "ConnectionError", NOW + 0.2)
    found = failures.first(tmp_path)
    assert found is not None and found.short == "rank 10 on node2: ValueError: torn"


def test_copied_files_are_ordered_by_what_is_in_them(tmp_path: Path) -> None:
    left(tmp_path, 0, "later", NOW + 60)
    left(tmp_path, 1, "earlier", NOW)
    os.utime(tmp_path / "1" / "error.json", (NOW + 500, NOW + 500))
    found = failures.first(tmp_path)
    assert found is not None and found.message == "earlier"


def test_who_hung_because_of_another_is_not_the_cause(tmp_path: Path) -> None:
    failures.write(tmp_path / "0", "no step for 30 s", NOW, waited=True)
    failures.write(tmp_path / "1", "it is in tokenise", NOW + 5)
    found = failures.first(tmp_path)
    assert found is not None and found.rank == 1


def test_what_a_rank_said_of_itself_stays(tmp_path: Path) -> None:
    left(tmp_path, 0, "its own", NOW)
    failures.write(tmp_path / "0", "from outside", NOW)
    found = failures.read(tmp_path / "0")
    assert found is not None and found.message == "its own"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"message": {"extraInfo": {}}}'])
def test_a_file_that_cannot_be_read_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text(text)
    assert failures.first(tmp_path) is None


def test_a_plain_message_is_a_failure_too(tmp_path: Path) -> None:
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "error.json").write_text('{"message": "torn"}')
    found = failures.first(tmp_path)
    assert found is not None and (found.rank, found.message) == (4, "torn")


def test_the_traceback_s_end_is_told_or_what_the_rank_said_last(tmp_path: Path) -> None:
    left(tmp_path, 0, "torn", NOW, "node1")
    log = tmp_path / "0" / ranklogs.FILE
    log.write_text(f"{ranklogs.stamp(NOW)} node1 e its last words\n")
    found = failures.read(tmp_path / "0")
    assert found is not None
    assert "Traceback of 0" in found.told(heard=False) and "last words" not in found.told(heard=False)
    assert (
        found.told(heard=True)
        == f"loomtune: the first to fail was {found.short}\nloomtune: all that it said is in {log}"
    )
    failures.write(tmp_path / "1", failures.how(-9), NOW)
    (tmp_path / "1" / ranklogs.FILE).write_text(log.read_text())
    killed = failures.read(tmp_path / "1")
    (tmp_path / "2").mkdir()
    failures.write(tmp_path / "2", "torn", NOW)
    silent = failures.read(tmp_path / "2")
    assert silent is not None and silent.told(heard=False).endswith("torn\nloomtune: it said nothing")
    assert killed is not None and "its last words" in killed.told(heard=False) and "SIGKILL" in killed.short


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def cause(run: Path, rank: int) -> failures.Failure:
    return failures.Failure(rank, "node2", NOW, "torn", "", False, run / "log")


def test_a_run_without_a_result_gets_one_with_its_last_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"st')
    failures.conclude(tmp_path, cause(tmp_path, 0), NOW, ())
    assert result(tmp_path) == {"status": "failed", "step": 7, "metrics": {}, "error": "rank 0 on node2: torn"}


def test_a_run_that_was_asked_to_leave_goes_on_another_time(tmp_path: Path) -> None:
    failures.conclude(tmp_path, None, NOW, ())
    assert result(tmp_path) == {"status": "preempted", "step": 0, "metrics": {}, "error": None}


@pytest.mark.parametrize(
    ("status", "rank", "expected"),
    [
        ("failed", 1, "rank 1 on node2: torn"),
        ("failed", 0, "as rank 0 said"),
        ("completed", 1, "as rank 0 said"),
        ("preempted", 1, "as rank 0 said"),
    ],
)
def test_a_failed_result_names_the_cause_where_that_is_another_rank(
    status: str, rank: int, expected: str, tmp_path: Path
) -> None:
    said = {"status": status, "step": 3, "metrics": {"loss": 1.0}, "error": "as rank 0 said"}
    (tmp_path / "result.json").write_text(json.dumps(said))
    failures.conclude(tmp_path, cause(tmp_path, rank), NOW, ())
    assert result(tmp_path) == said | {"error": expected}


@pytest.mark.parametrize(("pid", "taken", "written"), [(7, NOW + 1, True), (8, NOW + 1, False), (8, NOW - 1, True)])
def test_the_result_of_a_newer_attempt_is_not_touched(pid: int, taken: float, written: bool, tmp_path: Path) -> None:
    (tmp_path / "lease").write_text(json.dumps({"attempt": "x", "host": "h", "pid": pid, "time": taken}))
    failures.conclude(tmp_path, cause(tmp_path, 1), NOW, (7,))
    assert (tmp_path / "result.json").exists() is written


def test_a_result_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json.new").symlink_to("/dev/full")
    failures.missing(tmp_path, "torn")
    assert "result.json cannot be written: [Errno 28]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ends_are_put_into_words() -> None:
    assert failures.how(3) == "ended with exit code 3"
    assert failures.how(-11) == "ended by signal 11 (SIGSEGV)"
    assert "ran out of memory" in failures.how(-9) and "unknown" in failures.how(-200)
