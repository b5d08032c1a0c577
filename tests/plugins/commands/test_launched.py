"""Commands about a run that was launched: they ask the launcher that started it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loomtune import api, cli
from loomtune.contracts import JobStatus
from loomtune_launchers import jobs
from loomtune_launchers.watching import ranklogs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose process has ended."""
    plan = api.compose(["steps=1", f"run.dir={tmp_path}"])
    (tmp_path / "run.yaml").write_text(plan.dump())
    jobs.note(tmp_path, "local", pid=1, host=socket.gethostname(), began=1.0)
    folder = ranklogs.begin(tmp_path, "one") / "0"
    folder.mkdir()
    (folder / ranklogs.FILE).write_text("2026-11-22T19:38:18.123456Z node7 o it begins\n")
    return tmp_path


def asked(*words: Any) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code or 0


def test_the_status_is_the_launcher_s_word(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("status", run) == 0
    assert capsys.readouterr().out == f"failed: process 1 on {socket.gethostname()}\n"
    assert asked("status", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "failed"


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_logs_are_those_of_all_ranks(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("logs", *words, run) == 0
    assert capsys.readouterr().out == "19:38:18.123 rank 0 node7 | it begins\n"


def test_who_has_read_enough_of_the_logs_may_leave(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: Any, **named: Any) -> Iterator[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranklogs, "merged", interrupted)
    assert asked("logs", "-f", run) == 130


def test_a_cancelled_run_is_told_to_be_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("cancel", run) == 0
    assert (run / "cancelled").exists() and capsys.readouterr().err == "loomtune: cancelled\n"
    assert api.launched(run).status(run) == JobStatus("cancelled", f"process 1 on {socket.gethostname()}")


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_folder_that_holds_no_run_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(command, tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err
