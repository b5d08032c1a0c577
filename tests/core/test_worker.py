"""What a rank leaves where torchrun looks for it, and its exit code."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from loomtune import assembly, worker
from loomtune.checkpoint import files
from loomtune.errors import PeerLost, Preempted, UserError


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(worker, "end_stuck_agent", lambda: None)
    return tmp_path / "error.json"


def failing(error: Exception) -> int:
    def work() -> None:
        raise error

    return worker.guarded(work)


@pytest.mark.parametrize(("error", "code"), [(ZeroDivisionError("by nought"), 1), (UserError.of("no lr", "set it"), 2)])
def test_torchrun_s_report_has_the_error_and_the_place_of_a_rank_that_failed(
    left: Path, error: Exception, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    failure = ProcessFailure(0, 1, code, str(left))
    report = ChildFailedError("loomtune.train", {3: failure}).format_msg()
    assert str(error).splitlines()[0] in report and f"{type(error).__name__}" in report
    assert __file__ in report, "the traceback"
    assert str(error).splitlines()[0] in capfd.readouterr().err


def test_an_error_that_another_rank_caused_is_told_as_such(left: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lost = PeerLost("lost rank 1")
    lost.__cause__ = RuntimeError("Connection closed by peer")
    assert failing(lost) == 1
    assert json.loads(left.read_text())["message"]["extraInfo"]["waited"] is True
    said = capfd.readouterr().err
    assert said.index("RuntimeError: Connection closed by peer") < said.index("loomtune: lost rank 1")
    assert failing(ValueError("mine")) == 1
    assert json.loads(left.read_text())["message"]["extraInfo"]["waited"] is False


def test_a_full_disk_changes_neither_what_is_said_nor_the_exit_code(
    left: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *blocks: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    assert failing(UserError.of("no lr", "set it")) == 2
    assert capfd.readouterr().err == "loomtune: no lr\n    cure: set it\n"
    assert not left.exists(), "torch cannot read half a file"


def test_where_nobody_looks_nothing_is_left(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert failing(ValueError("mine")) == 1 and not left.exists()


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [("completed", None, 0), ("preempted", None, Preempted.exit_code), ("completed", "the export failed", 1)],
)
def test_the_exit_code_says_how_it_ended(left: Path, status: str, error: str | None, code: int) -> None:
    assert worker.guarded(lambda: {"status": status, "error": error}) == code
    assert not left.exists()


@pytest.mark.parametrize(("asked", "gone"), [(True, False), (True, True), (False, False)])
def test_ranks_that_are_asked_to_leave_do_so_once_the_first_has_written_all(
    asked: bool, gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the others as soon as one has left."""
    seen: list[list[str]] = []

    def barrier() -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        if gone:
            raise RuntimeError("Connection closed by peer")

    def trained(given: object) -> str:
        if asked:
            raise Preempted("asked to leave")
        return "stopped"

    told = SimpleNamespace(tell=lambda event, **named: (tmp_path / event).touch())
    run = SimpleNamespace(step=3, metrics={}, guards=[], events=told, tell_once=lambda said: None)
    monkeypatch.setattr(assembly, "assemble", lambda *words, **named: SimpleNamespace(run=run))
    monkeypatch.setattr(worker, "_trained", trained)
    world: Any = SimpleNamespace(leads=True, barrier=barrier)
    given: Any = None
    result = worker._attempt(given, tmp_path, world, given, given)
    assert result["status"] == ("preempted" if asked else "stopped")
    assert [sorted(names) for names in seen] == ([["result.json", "run_finished"]] if asked else [])
