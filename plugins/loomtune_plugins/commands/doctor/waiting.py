"""How long the launching process waits: a time for the queue, then one for the examination; what overruns is ended."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from loomtune.contracts import JobStatus, Launcher
from loomtune_plugins.commands.doctor.findings import FAULT, Finding

PAUSE = 1.0
STUBBORN = 60.0
"""Seconds after which a launcher that was asked to end its job is left to itself."""


@dataclass
class Deadline:
    """timeout: seconds from when the job was first seen not to be pending. wait: seconds that it may be pending."""

    timeout: float
    wait: float
    queued: float = field(default_factory=time.monotonic)
    began: float | None = None

    def over(self, status: JobStatus) -> Finding | None:
        """What is wrong where the time is over."""
        now = time.monotonic()
        if status.state == "pending":
            what = f"the job did not start within {self.wait:.0f} s: {status.detail}"
            return Finding(FAULT, what, "look at its queue, or raise --wait") if now > self.queued + self.wait else None
        self.began = self.began or now
        what = f"the examination was not over within {self.timeout:.0f} s and was ended"
        return (
            Finding(FAULT, what, "see above what hangs, or raise --timeout")
            if now > self.began + self.timeout
            else None
        )


def awaited(launcher: Launcher, folder: Path, deadline: Deadline, done: Callable[[], bool]) -> list[Finding]:
    """Waits for the end of a job that an engine has; ends it when its time is over."""
    with cancelled_with_us(launcher, folder):
        while not done():
            status = launcher.status(folder)
            if status.state not in ("pending", "running", "unknown"):
                return []
            if late := deadline.over(status):
                launcher.cancel(folder)
                return [late]
            time.sleep(PAUSE)
    return []


@contextmanager
def cancelled_with_us(launcher: Launcher, folder: Path) -> Iterator[None]:
    """Around waiting for a job that an engine has: Ctrl-C does not leave it in the engine's queue."""
    try:
        yield
    except KeyboardInterrupt:
        print("loomtune doctor: cancelling the job", file=sys.stderr, flush=True)
        launcher.cancel(folder)
        raise


@contextmanager
def bounded(
    launcher: Launcher, folder: Path, deadline: Deadline, late: list[Finding], leave: Callable[[], int]
) -> Iterator[None]:
    """Around waiting within the launcher: its job is ended when its time is over; `late` then says so.

    leave: says what is known, and gives this process' exit code, where the launcher does not end even then.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(PAUSE):
            if found := deadline.over(_status(launcher, folder)):
                late.append(found)
                _cancel(launcher, folder)
                if not ended.wait(STUBBORN):
                    os._exit(leave())

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _cancel(launcher: Launcher, folder: Path) -> None:
    """In a thread of its own, since it may hang as the job does; what it raises, `late` says already."""

    def cancel() -> None:
        with suppress(Exception):
            launcher.cancel(folder)

    threading.Thread(target=cancel, daemon=True).start()


def _status(launcher: Launcher, folder: Path) -> JobStatus:
    with suppress(Exception):  # there may be no record yet
        return launcher.status(folder)
    return JobStatus("unknown")
