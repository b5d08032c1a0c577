"""Requests to stop, and processes that must not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG

TOGETHER = 2.0
"""Seconds within which signals are one: a scheduler tells every process, and torchrun tells its ranks again."""


class StopRequest:
    """A flag that a signal or a file raises; ranks agree on it at a step's edge. A second signal leaves at once.

    file: set on the one rank that looks for it. asked: what this process heard.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.file: Path | None = None
        self.asked, self._ordered = False, 0.0

    @property
    def requested(self) -> bool:
        """Whether this process was asked to leave. The file has done its work once it was seen, and is taken away."""
        if self.file and self.file.exists():
            self.asked = True
            self.file.unlink(missing_ok=True)
        return self.asked

    def listen(self) -> None:
        """Takes over the signals of this process."""
        for number in self.SIGNALS:
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.asked, now = True, time.monotonic()
        if number != signal.SIGUSR1:  # which only warns
            self._ordered = self._ordered or now
            if now - self._ordered > TOGETHER:
                os._exit(1)  # what was committed is intact


def end(code: int) -> NoReturn:
    """Ends this process at once, its work done and its files closed.

    Taking down gloo's threads with the interpreter can abort the process (torch 2.13: "terminate called without an
    active exception"), which torchrun takes for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Asks Linux to end this process when its parent ends: torchrun's ranks live in sessions of their own.

    LOOMTUNE_PARENT is the process that started this one, if need be through a wrapper; where it is no ancestor any
    more, it ended before we asked. A parent in another space of process ids is 0.
    """
    if sys.platform != "linux":
        return
    parent = int(os.environ.get("LOOMTUNE_PARENT") or os.getppid())
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() not in (parent, 0) and parent not in (process.pid for process in psutil.Process().parents()):
        os._exit(1)


def end_stuck_agent(seconds: float = 10.0) -> None:
    """Ends the torchrun above this process, and so this process, where it does nothing at all for so many seconds.

    torch 2.13: an agent that is cut off from its rendezvous waits in the store for an answer until TCP gives up, many
    minutes later, whatever `read_timeout` says. One that is well wakes up ten times a second.
    """
    with suppress(psutil.Error):
        named = os.environ.get("LOOMTUNE_PARENT")  # by a launcher's agent
        agent = psutil.Process(int(named or os.getppid()))
        said = " ".join(agent.cmdline())
        if (named or "torchrun" in said or "torch.distributed.run" in said) and not _moves(agent, seconds):
            print("loomtune: torchrun hangs, cut off from its rendezvous: it is ended", file=sys.stderr, flush=True)  # noqa: T201
            agent.kill()


def _moves(process: psutil.Process, seconds: float) -> bool:
    """Whether its main thread runs within so many seconds."""
    until, before = time.monotonic() + seconds, process.num_ctx_switches()
    while (still := process.num_ctx_switches() == before) and time.monotonic() < until:
        time.sleep(0.2)
    return not still
