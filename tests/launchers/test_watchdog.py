"""The watch over a node's ranks: which one others wait for, by what can be seen from outside."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loomtune_launchers.watching import watchdog
from loomtune_launchers.watching.watchdog import Found, Rank, Watchdog

PATIENCE = 60.0

STACKS = """Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/loomtune/loop.py", line 80 in step
"""


def rank(folder: Path, number: int, pid: int, idle: float = 0.0, seconds: float = 60.0, step: int = 4) -> Rank:
    """A rank whose last sign of life was some seconds ago."""
    beat = {"beat": time.monotonic() - idle, "seconds": seconds, "step": step}
    (folder / str(number)).write_text(json.dumps(beat))
    logs = folder / "logs" / str(number)
    logs.mkdir(parents=True)
    return Rank(number, pid, logs, folder)


def sleeper() -> subprocess.Popen[bytes]:
    """A process of its own session, which SIGUSR2 does not end."""
    deaf = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print('', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-S", "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_where_the_main_thread_is_stands_last_and_its_innermost_frame_first() -> None:
    assert watchdog.innermost(STACKS) == "/site-packages/torch/distributed/distributed_c10d.py line 2810 in all_reduce"
    assert watchdog.innermost("Thread 0x1 (most recent call first):\n  <no Python frame>") == ""


def test_all_ranks_are_ended_when_one_is_late_and_the_lowest_step_is_furthest_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.0)
    told: list[Found] = []
    with sleeper() as one, sleeper() as other:
        ranks = [rank(tmp_path, 0, one.pid), rank(tmp_path, 1, other.pid, idle=5.0, seconds=4.0, step=3)]
        for number in (0, 1):
            (tmp_path / f"{number}.stacks").write_text(STACKS)
        dog = Watchdog(ranks, lambda found, idle: told.append(found))
        assert one.wait(PATIENCE) == other.wait(PATIENCE) == -signal.SIGKILL
        dog.close()
    (found,) = told
    assert (found.rank.number, found.step, found.reason) == (1, 3, "")
    assert all("rank " in (one.folder / "stacks.txt").read_text() for one in ranks)


def test_who_is_not_in_a_call_of_torch_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.0)
    monkeypatch.setattr(watchdog, "_py_spy", lambda pid: "")
    with sleeper() as one:
        ranks = [rank(tmp_path, 0, one.pid), rank(tmp_path, 1, one.pid), rank(tmp_path, 2, one.pid)]
        (tmp_path / "0.stacks").write_text(STACKS)
        (tmp_path / "1.stacks").write_text(STACKS.replace("/torch/distributed", "/data"))
        reasons = [found.reason for found in watchdog.look(ranks) if found]
        one.kill()
    assert reasons[0] == "" and "/data/" in reasons[1] and reasons[2] == "it did not answer"


def test_before_its_first_beat_a_rank_is_neither_watched_nor_sent_a_signal_that_would_end_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) as process:
        young = Rank(0, process.pid, tmp_path, tmp_path)
        assert young.beat() is None and watchdog.look([young]) == [None]
        assert process.poll() is None and "kernel: " in (tmp_path / "stacks.txt").read_text()
        process.kill()


def test_nobody_who_is_in_time_is_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "EVERY", 0.01)
    with sleeper() as process:
        dog = Watchdog([rank(tmp_path, 0, process.pid, idle=30.0)], lambda found, idle: None)
        time.sleep(0.1)
        dog.close()
        assert process.poll() is None
        process.kill()


def test_nccl_is_asked_for_its_record_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 0.2)
    told = watchdog.flight_recorder(tmp_path)
    pipe, trace = Path(told["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "0.pipe"), Path(told["TORCH_FR_DUMP_TEMP_FILE"] + "0")
    os.mkfifo(pipe)
    listening = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    trace.write_bytes(b"record")
    with sleeper() as process:
        watched = rank(tmp_path, 0, process.pid)
        watchdog.look([watched])
        process.kill()
    assert os.read(listening, 10) and (watched.folder / "nccl-flight-recorder").read_bytes() == b"record"
    os.close(listening)


def test_py_spy_is_asked_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "py-spy"
    program.write_text("#!/bin/sh\necho seen $@")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert watchdog._py_spy(7) == "py-spy:\nseen dump --nonblocking --pid 7"
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watchdog._py_spy(7) == ""
