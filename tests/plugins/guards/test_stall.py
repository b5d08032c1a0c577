"""A process that makes no step ends itself, and says where it hung."""

import subprocess
import sys
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
    assert not list((tmp_path / "logs").iterdir())


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
