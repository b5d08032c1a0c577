"""The items of a batch, so many at a time, watched until all have ended. One thread: a signal finds it at work."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loomtune.errors import LoomtuneError, Preempted, UserError
from loomtune_plugins.commands.sweeps.items import Item
from loomtune_plugins.commands.sweeps.processes import Running
from loomtune_plugins.commands.sweeps.pruning import Curve, hopeless

BETWEEN = 0.1
"""Seconds between two looks at who has ended."""

Start = Callable[[Item, int], Running]
"""Starts an item in one of the places that there are at a time."""


@dataclass(slots=True)
class Asked:
    """How often the sweep was asked to leave, by a signal."""

    times: int = 0

    @contextmanager
    def listening(self) -> Iterator[Asked]:
        """Takes over SIGINT and SIGTERM."""

        def heard(number: int, frame: object) -> None:
            self.times += 1

        before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(slots=True)
class Crew:
    """Runs items. jobs: how many at a time. prune_after: steps, 0 for never. curves: of items that have ended."""

    start: Start
    jobs: int
    asked: Asked
    prune_after: int = 0
    curves: dict[str, Curve] = field(default_factory=dict)
    _running: dict[int, Running] = field(default_factory=dict)

    def run(self, items: Sequence[Item], begun: Sequence[Running] = ()) -> None:
        """Returns when all have ended; begun: those that are under way already, beside the others.

        Raises Preempted where the sweep was asked to leave, when none of its items runs here any more.
        """
        waiting = deque(items)
        self._running = {-1 - number: running for number, running in enumerate(begun)}
        try:
            while (waiting or self._running) and not self.asked.times:
                self._fill(waiting)
                self._sweep_up()
                self._prune()
                time.sleep(BETWEEN)
        finally:
            self._clear()
        if self.asked.times:
            raise Preempted("the sweep was asked to leave; the same command goes on with it")

    def _fill(self, waiting: deque[Item]) -> None:
        for place in range(self.jobs):
            if waiting and place not in self._running:
                item = waiting.popleft()
                item.status = "running"
                item.write()
                tell(f"{item.name} starts: {item.label}")
                try:
                    self._running[place] = self.start(item, place)
                except LoomtuneError as error:  # an engine that does not take it
                    failed(item, error)

    def _sweep_up(self) -> None:
        for place, running in list(self._running.items()):
            if running.over():
                item = running.item
                value = "" if item.value is None else f", {item.goal.metric} {item.value:.6g}"
                tell(f"{item.name} {item.status}{value}{': ' if item.error else ''}{item.error}")
                del self._running[place]
                if self.prune_after:
                    self.curves[item.name] = item.curve()

    def _prune(self) -> None:
        if not self.prune_after:
            return
        mine = {running.item.name: running.item.curve() for running in self._running.values()}
        for running in self._running.values():
            name, known = running.item.name, self.curves | mine
            others = [curve for other, curve in known.items() if other != name]
            if not running.pruned and hopeless(mine[name], others, self.prune_after, running.item.goal):
                tell(f"{name} is pruned at step {max(mine[name])}")
                running.prune()

    def _clear(self) -> None:
        """Asks what runs here to leave and waits for it; a second signal to the sweep ends it at once."""
        for place, running in list(self._running.items()):
            if running.stays:
                tell(f"{running.item.name} goes on where it is; `loomtune cancel {running.item.folder}` would end it")
                del self._running[place]
            else:
                running.leave()
        once = self.asked.times
        while self._running:
            if self.asked.times > max(1, once):
                for running in self._running.values():
                    running.kill()
            self._sweep_up()
            time.sleep(BETWEEN)


def failed(item: Item, error: Exception) -> None:
    """Puts down, and says, why an item does not even start."""
    said = str(error) if isinstance(error, LoomtuneError) else f"{type(error).__name__}: {error}"
    item.ended("failed", said)
    tell(f"{item.name} cannot run: {item.label}\n{said}")


def places(jobs: int, gpus: int) -> list[dict[str, str]]:
    """What the environment of an item says in each of the places. gpus: of an item, 0 for all of them.

    Raises UserError where there are fewer than that takes.
    """
    if jobs < 1 or gpus < 0:
        what = f"hydra.launcher.jobs={jobs} with hydra.launcher.gpus={gpus} runs nothing"
        raise UserError.of(what, "set hydra.launcher.jobs to 1 or more, and gpus to 0 or more")
    if not gpus:
        return [{} for _ in range(jobs)]
    there = _gpus()
    if jobs * gpus > len(there):
        what = f"hydra.launcher.jobs={jobs} items of {gpus} GPUs need {jobs * gpus}, and {len(there)} are here"
        raise UserError.of(what, f"set hydra.launcher.jobs={max(1, len(there) // gpus)}, or hydra.launcher.gpus less")
    shares = [there[place * gpus : (place + 1) * gpus] for place in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    return found if visible is None else [name.strip() for name in visible.split(",") if name.strip()]


def tell(line: str) -> None:
    """Says something to whoever waits."""
    print(f"loomtune: {line}", file=sys.stderr, flush=True)
