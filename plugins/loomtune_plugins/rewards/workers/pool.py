"""Several workers, which score many answers without any of them waiting for another's."""

from __future__ import annotations

import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loomtune_plugins.rewards.scored import TOO_LONG, Failure, Scored
from loomtune_plugins.rewards.workers.process import Call, Process

MOST = 8
"""Workers of a rank where nobody says how many."""

PART = 16
"""Calls that a worker is given at a time: enough to keep it busy, few enough to share them out."""

BEGINNING = 120.0
"""Seconds that importing what scores may take."""

_LOOK = 0.5
"""Seconds between two looks at whether the run was asked to leave."""


@dataclass(kw_only=True)
class Pool:
    """Workers that call one function.

    target: `package.module:name` or `path.py:name`. setup: what to call it with first, to get what scores; None: it is
    that itself. seconds: for a call. memory: bytes that a worker may take; 0: any. workers: at most; 0: see `MOST`.
    """

    target: str
    setup: Mapping[str, Any] | None = None
    seconds: float = 1.0
    memory: int = 0
    workers: int = 0
    processes: list[Process] = field(default_factory=list, init=False)
    _calls: Sequence[Call] = field(default=(), init=False)
    _waiting: deque[int] = field(default_factory=deque, init=False)
    _found: dict[int, list[Scored]] = field(default_factory=dict, init=False)
    _refused: Failure | None = field(default=None, init=False)

    def check(self) -> Failure | None:
        """Has a worker begin; why it cannot, if so."""
        self._call([], least=1)
        return self._refused

    def call(self, calls: Sequence[Call], leave: Callable[[], bool] = bool) -> list[list[Scored]]:
        """The scores of each call. leave: asked now and then; where it says so, what is left is not scored."""
        return self._call(calls, leave=leave)

    def close(self) -> None:
        """Ends the workers."""
        while self.processes:
            self.processes.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        """Its workers stay where they are."""
        return {**self.__dict__, "processes": []}

    def _call(self, calls: Sequence[Call], *, least: int = 0, leave: Callable[[], bool] = bool) -> list[list[Scored]]:
        self._calls, self._waiting, self._found, self._refused = calls, deque(range(len(calls))), {}, None
        try:
            while (len(self._found) < len(calls) or self._unbegun(least)) and not self._refused and not leave():
                self._employ(least)
                self._listen()
        except BaseException:
            self.close()  # what they still say must not be taken for the next answers
            raise
        if any(process.busy for process in self.processes):
            self.close()
        left = self._refused or Failure("the run is asked to leave", "")
        return [self._found.get(number, [left] * count) for number, (count, _) in enumerate(calls)]

    def _unbegun(self, least: int) -> bool:
        return sum(process.ready for process in self.processes) < least

    def _employ(self, least: int) -> None:
        """Starts workers for what waits, and gives each that is idle a part of it."""
        for process in list(self.processes):
            if not process.alive and not process.busy:
                self._dismiss(process)
        wanted = max(least, -(-(len(self._waiting) + sum(len(p.busy) for p in self.processes)) // PART))
        while len(self.processes) < min(wanted, self.workers or min(MOST, os.cpu_count() or 1)):
            self.processes.append(self._started())
        for process in self.processes:
            if self._waiting and process.ready and not process.busy:
                numbers = [self._waiting.popleft() for _ in range(min(PART, len(self._waiting)))]
                process.give(numbers, [self._calls[number] for number in numbers])
                process.until = time.monotonic() + self.seconds

    def _started(self) -> Process:
        here = [str(Path.cwd()), *(path for path in sys.path if path)]
        begin = {"target": self.target, "setup": self.setup, "memory": self.memory, "path": here}
        process = Process(begin)
        process.until = time.monotonic() + BEGINNING
        return process

    def _listen(self) -> None:
        """Waits for what comes first: an answer, or the end of somebody's time."""
        waited_for = [process for process in self.processes if process.busy or not process.ready]
        with selectors.DefaultSelector() as events:
            for process in waited_for:
                events.register(process.reads, selectors.EVENT_READ, process)
                if process.unsent:
                    events.register(process.writes, selectors.EVENT_WRITE, process)
            first = min((process.until for process in waited_for), default=0.0) - time.monotonic()
            for key, event in events.select(max(0.0, min(first, _LOOK))):
                if event & selectors.EVENT_WRITE:
                    key.data.send()
                else:
                    self._take(key.data)
        for process in waited_for:
            if process in self.processes and (process.busy or not process.ready) and process.until < time.monotonic():
                begun = process.ready
                self._lose(process, Failure(TOO_LONG, f"{self.seconds if begun else BEGINNING:g} seconds"))

    def _take(self, process: Process) -> None:
        """What a worker said."""
        try:
            answers = process.heard()
        except ValueError as error:
            self._lose(process, Failure("it answers in the worker's place", str(error)))
            return
        if answers is None:
            self._lose(process, process.why())
            return
        for answer in answers:
            if not process.ready:
                process.ready = not answer
                if answer:
                    self._lose(process, Failure(f"{answer[0]} at its beginning", str(answer[-1])))
            elif process.busy:
                self._note(process.busy.popleft(), answer)
                if answer[:1] == ["MemoryError"]:  # what fills a worker's memory may be what earlier calls left there
                    self._dismiss(process)
            process.until = time.monotonic() + self.seconds

    def _note(self, number: int, answer: list[Any]) -> None:
        """A call's scores, or its failure, which is that of each of its answers."""
        count = self._calls[number][0]
        if len(answer) == count and all(isinstance(one, float) for one in answer):
            self._found[number] = answer
        else:
            self._found[number] = [Failure(*map(str, (*answer, "")[:2]))] * count

    def _lose(self, process: Process, why: Failure) -> None:
        """Ends a worker: the call at work has failed. One that could not begin would not the next time either."""
        if not process.ready:
            self._refused = why
        elif process.busy:
            number = process.busy.popleft()
            self._found[number] = [why] * self._calls[number][0]
        self._dismiss(process)

    def _dismiss(self, process: Process) -> None:
        """Ends a worker; the calls that it did not get to wait for another one."""
        self._waiting.extendleft(reversed(process.busy))
        process.busy.clear()
        process.close()
        if process in self.processes:
            self.processes.remove(process)
