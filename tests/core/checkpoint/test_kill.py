"""A process that is killed at any instant of a save: every system-near call of it is tried as the last."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import FrameType
from typing import Any

import pytest
from checkpoint_fakes import FakeEngine, Network, equal, full, network, saver

from loomtune.checkpoint import Reader, latest

CALLS = {"open", "write", "flush", "rename", "replace", "mkdir", "rmdir", "unlink"}


def tiny(seed: int) -> Network:
    return {"embed.weight": network(seed)["embed.weight"]}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written is seen by others, on the disk or not."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save(folder: Path, step: int, seed: int) -> None:
    one = saver(folder, keep=1)
    one.start(step, {"policy": FakeEngine(tiny(seed))}, {"seed": seed}, full())  # type: ignore[dict-item]
    one.finish()


def killed_at(last: int, work: Callable[[], None]) -> bool:
    """Runs work in a child that kills itself at the given one of its calls; True where it came to that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            if event == "c_call" and argument.__name__ in CALLS:
                calls += 1
                if calls == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        import threading

        threading.setprofile(count)
        sys.setprofile(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def held(path: Path | None) -> int:
    """The seed of the network in a checkpoint, every tensor of which was compared."""
    assert path is not None, "a checkpoint was there before, and one must stay"
    reader = Reader(path)
    seed = int(reader.state["seed"])
    assert equal(FakeEngine(tiny(0)).read(reader.read("policy")), tiny(seed))
    return seed


@pytest.mark.parametrize("step", [10, 20], ids=["the same step again", "the next step"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path, step: int) -> None:
    save(tmp_path / "start", 10, seed=1)
    seen, last = [], 1
    while True:
        folder = copytree(tmp_path / "start", tmp_path / f"{last}")
        killed = killed_at(last, lambda folder=folder: save(folder, step, seed=2))
        seen.append(held(latest(folder)))
        save(folder, 30, seed=3)  # the next attempt goes on over whatever lies about
        assert held(latest(folder)) == 3
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000030"]
        if not killed:
            break
        last += 1
    assert last > 40, "as many calls at least are killed at"
    assert seen == sorted(seen) and set(seen) == {1, 2}, "what is committed stays so"


def test_a_kill_during_the_first_save_leaves_nothing_that_counts(tmp_path: Path) -> None:
    found = set()
    for last in range(1, 200):
        folder = tmp_path / f"{last}"
        killed = killed_at(last, lambda folder=folder: save(folder, 10, seed=2))
        path = latest(folder)
        found.add(held(path) if path else 0)
        if not killed:
            break
    assert found == {0, 2} and not killed
