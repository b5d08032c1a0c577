"""What a job said: the batch script's own words, and those of the ranks."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from loomtune_launchers.watching import ranklogs

EVERY = 3.0
"""Seconds between two questions to the controller, which answers everybody."""


def lines(run: Path, output: Path, active: Callable[[], bool] | None) -> Iterator[str]:
    """The script's lines, then the ranks' in order of time. active: follow both while it says so."""
    own = _Own(run, output)
    if active is None:
        yield from own.lines(last=True)
        yield from ranklogs.merged(run)
        return
    asked = Seldom(active)
    ranks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(run, asked, ranks), daemon=True).start()
    try:
        ended = False
        while not ended:
            time.sleep(ranklogs.EVERY)
            while not ended and not ranks.empty():
                line = ranks.get()
                ended = line is None
                yield from [] if line is None else [line]
            yield from own.lines(last=ended)
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


class _Own:
    """Lines of the script's file without those of rank 0, which an agent repeats there for whoever looks at it."""

    def __init__(self, run: Path, output: Path) -> None:
        self._run, self._path, self._offset = run, output, 0
        self._waiting: list[str] = []
        self._repeated: Counter[str] = Counter()
        self._tails: dict[Path, ranklogs.Tail] = {}

    def lines(self, last: bool) -> Iterator[str]:
        """Those that have come up to the last call, so that rank 0's own file has had time; or all that there are."""
        new = self._new()
        waiting, self._waiting = [*self._waiting, *(new if last else [])], [] if last else new
        for attempt in ranklogs.attempts(self._run):
            path = attempt / "0" / ranklogs.FILE
            if path.is_file():
                tail = self._tails.setdefault(path, ranklogs.Tail(path))
                self._repeated.update(record.text for record in tail)
        for line in waiting:
            if self._repeated[line] > 0:
                self._repeated[line] -= 1
            else:
                yield line

    def _new(self) -> list[str]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            found = file.readlines()
        self._offset += sum(map(len, found))
        return [line.decode(errors="replace").rstrip("\n") for line in found]
