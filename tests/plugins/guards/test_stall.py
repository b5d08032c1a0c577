"""A process that makes no step ends itself, and says where it hung."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from loomtune.contracts import Verdict
from loomtune.errors import UserError
from loomtune_plugins.guards.settings import StallSettings
from loomtune_plugins.guards.stall import Stall

HANGS = """
import sys, threading
from pathlib import Path
from types import SimpleNamespace
from loomtune_plugins.guards.settings import StallSettings
from loomtune_plugins.guards.stall import Stall

def waits_for_a_lost_peer():
    threading.Event().wait(60)

guard = Stall(StallSettings(seconds=0.3))
guard.started(SimpleNamespace(folder=Path(sys.argv[1]), world=SimpleNamespace(rank=3)))
guard.judge(1, 1.0, 1.0)
waits_for_a_lost_peer()
"""


def test_a_stalled_process_ends_with_status_1_and_leaves_its_stacks(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, timeout=50, check=False
    )
    stacks = (tmp_path / "logs" / "stall-3.txt").read_text()
    assert ended.returncode == 1
    assert "waits_for_a_lost_peer" in stacks and "guard.stall.seconds=0.3" in stacks
    assert "waits_for_a_lost_peer" in ended.stderr


def test_a_run_that_ends_in_time_leaves_no_file(tmp_path: Path) -> None:
    run = SimpleNamespace(folder=tmp_path, world=SimpleNamespace(rank=0))
    guard = Stall(StallSettings(seconds=3600))
    guard.started(run)
    assert guard.judge(1, float("nan"), 1.0).verdict is Verdict.CONTINUE
    guard.finished(run)
    assert not list(tmp_path.rglob("stall-*"))


def test_a_process_that_is_killed_leaves_no_empty_file(tmp_path: Path) -> None:
    killed = HANGS.replace("0.3", "60").replace("threading.Event().wait(60)", "import os; os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", killed, tmp_path], timeout=50, check=False).returncode == -9
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_where_nothing_can_be_written_the_stacks_are_said(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1 and "waits_for_a_lost_peer" in ended.stderr


def test_a_run_that_failed_before_its_first_step_can_be_finished() -> None:
    Stall(StallSettings()).finished(SimpleNamespace())


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"guard\.stall\.seconds"):
        Stall(StallSettings(seconds=0))


def test_whoever_waits_for_rows_is_alive(tmp_path: Path) -> None:
    guard = Stall(StallSettings(seconds=3600))
    guard.started(SimpleNamespace(folder=tmp_path, world=SimpleNamespace(rank=0)))
    before = guard._last
    guard.waits()
    assert guard._last > before
    guard.finished(SimpleNamespace())


def test_an_agent_that_watches_gets_signs_of_life_and_stacks_and_has_a_minute_to_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_HEARTBEATS", str(tmp_path))
    guard = Stall(StallSettings(seconds=7.0))
    assert guard._allowed == 7.0
    guard.started(SimpleNamespace(folder=tmp_path, world=SimpleNamespace(rank=3), step=11))
    assert guard._allowed == 67.0
    began = json.loads((tmp_path / "3").read_text())
    assert (began["seconds"], began["step"]) == (7.0, 11) and 0 <= time.monotonic() - began["beat"] < 60
    guard.judge(12, 1.0, 1.0)
    guard.waits()
    last = json.loads((tmp_path / "3").read_text())
    assert last["step"] == 12 and last["beat"] > began["beat"]
    os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_an_agent_that_watches" in (tmp_path / "3.stacks").read_text()
    guard.finished(SimpleNamespace())
    assert not (tmp_path / "3").exists(), "nothing more is to be expected of this process"
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
