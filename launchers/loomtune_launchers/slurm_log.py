"""What a job said: the batch script's own words, and those of the ranks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loomtune_launchers import ranklogs

EVERY = 3.0
"""Seconds between two questions to the controller, which answers everybody."""


def lines(run: Path, output: Path, active: Callable[[], bool] | None) -> Iterator[str]:
    """The script's lines, then the ranks' in order of time. active: follow both while it says so."""
    own = _Tail(output)
    if active is None:
        yield from own.new()
        yield from ranklogs.merged(run)
        return
    asked = Seldom(active)
    ranks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(run, asked, ranks), daemon=True).start()
    try:
        ended = False
        while not ended:
            time.sleep(ranklogs.EVERY)
            yield from own.new()
            while not ended and not ranks.empty():
                line = ranks.get()
                ended = line is None
                yield from [] if line is None else [line]
        yield from own.new()
    finally:
        asked.left = True


class Seldom:
    """Whether a run is over, asked every few seconds; also when whoever wanted to know has left."""

    def __init__(self, active: Callable[[], bool]) -> None:
        self.left = False
        self._active, self._asked, self._over = active, 0.0, False

    def __call__(self) -> bool:
        if not self._over and time.monotonic() - self._asked > EVERY:
            self._over, self._asked = not self._active(), time.monotonic()
        return self._over or self.left


def _read(run: Path, over: Callable[[], bool], into: queue.SimpleQueue[str | None]) -> None:
    try:
        for line in ranklogs.merged(run, follow=True, over=over):
            into.put(line)
    finally:
        into.put(None)


class _Tail:
    """Whole lines of the script's file, each given once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[str]:
        if self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    self._offset += len(line)
                    yield line.decode(errors="replace").rstrip("\n")
