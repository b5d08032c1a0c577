"""How a launcher in the foreground is asked to end, and how it speaks."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import FrameType
from typing import Any


class Asked(AbstractContextManager["Asked"]):
    """How often this process was asked to end: by a signal, or by what `also` says, which counts once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, also: Callable[[], bool]) -> None:
        self._also = also
        self._heard = 0
        self._before: dict[int, Any] = {}

    @property
    def times(self) -> int:
        """0: not yet."""
        return max(self._heard, int(self._also()))

    def __enter__(self) -> Asked:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard += 1


def say(text: str) -> None:
    """A line of ours on the terminal."""
    with suppress(OSError):  # the terminal may have been closed; the run goes on, or ends in order
        print(f"loomtune: {text}", file=sys.stderr, flush=True)  # noqa: T201
