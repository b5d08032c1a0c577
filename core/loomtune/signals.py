"""Requests to stop, and processes that must not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


class StopRequest:
    """A flag that a signal raises; ranks agree on it at a step's edge. A second signal ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Takes over the signals of this process."""
        for number in self.SIGNALS:
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number != signal.SIGUSR1:
            os._exit(1)  # what was committed is intact
        self.requested = True


def end(code: int) -> NoReturn:
    """Ends this process at once, its work done and its files closed.

    Taking down gloo's threads with the interpreter can abort the process (torch 2.13: "terminate called without an
    active exception"), which torchrun takes for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Asks Linux to end this process when its parent ends: torchrun's ranks live in sessions of their own."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
