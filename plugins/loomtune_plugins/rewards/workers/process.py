"""One worker, as the run sees it."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loomtune_plugins.rewards.scored import Failure

LONGEST = 1 << 20
"""Bytes of an answer's line, beyond which somebody else is talking."""

Call = tuple[int, tuple[Any, ...]]
"""How many scores are wanted, and the arguments."""


class Process:
    """A worker and what it is busy with. Nothing here waits for it.

    busy: the calls that it has not answered, by their numbers, the first one being at work. until: when that has had
    its time. ready: whether it has begun.
    """

    def __init__(self, begin: dict[str, Any]) -> None:
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # an interrupt at the terminal is the run's
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.writes, self.reads = self._process.stdin.fileno(), self._process.stdout.fileno()
        for place in (self.writes, self.reads):
            os.set_blocking(place, False)
        self.busy: deque[int] = deque()
        self.until = 0.0
        self.ready = False
        self._unsent, self._unread = b"", b""
        self._ends = weakref.finalize(self, _end, self._process)
        self._queue(begin)

    def give(self, numbers: Sequence[int], calls: Sequence[Call]) -> None:
        """More work for one that has none."""
        self.busy.extend(numbers)
        self._queue(list(calls))

    @property
    def unsent(self) -> bool:
        """Whether it has not yet taken all that it was given."""
        return bool(self._unsent)

    def send(self) -> None:
        """Writes as much as it takes now; one that is gone is seen when it is read."""
        with suppress(BlockingIOError, BrokenPipeError):
            self._unsent = self._unsent[os.write(self.writes, self._unsent) :]

    def heard(self) -> list[list[Any]] | None:
        """The answers that arrived; None where no more will come. Raises ValueError where it is none of its own."""
        with suppress(BlockingIOError):
            more = os.read(self.reads, 1 << 16)
            if not more:
                return None
            *lines, self._unread = (self._unread + more).split(b"\n")
            if len(self._unread) > LONGEST:
                raise ValueError("an endless line")
            return [_answer(line) for line in lines]
        return []

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def why(self) -> Failure:
        """Why it ended, which it is about to."""
        self.close()
        code = self._process.wait()
        how = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        return Failure("it ends its process", how)

    def close(self) -> None:
        """Ends it, and all that it started."""
        self._ends()

    def _queue(self, request: Any) -> None:
        body = pickle.dumps(request)
        self._unsent += struct.pack("<Q", len(body)) + body


def _answer(line: bytes) -> list[Any]:
    found = json.loads(line)
    if not isinstance(found, list):
        raise ValueError("no list")
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """The guardian ends when its pipe is closed; it is given a moment, and later only looked after."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
