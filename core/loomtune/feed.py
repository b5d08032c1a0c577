"""Which rows make each optimizer step.

What a step holds is a pure function of (seed, epoch, index); where and when a row is computed is decided later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Drawn, Sample
from loomtune.world import derive

if TYPE_CHECKING:
    from loomtune.run import Run


@dataclass(frozen=True, slots=True)
class Order:
    """The endless sequence of rows: epoch after epoch, each in an order of its own. Sample number -> row."""

    seed: int
    rows: int

    def row(self, number: int) -> int:
        """The row of the number-th sample of the run, counted from 0."""
        epoch, index = divmod(number, self.rows)
        return int(_permutation(self.seed, epoch, self.rows)[index])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive(seed, "order", epoch)).permutation(rows)


class Feed:
    """Draws rows, and hands out the optimizer steps that the objective makes of them.

    fetched: rows drawn so far. visited: samples handed out so far; a sample's number among them seeds its dropout.
    pending: steps that were made of drawn rows and are not trained on yet.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.order = Order(run.settings.seed, len(run.splits["train"]))
        self.set({})

    def set(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        self.fetched, self.visited = int(state.get("fetched", 0)), int(state.get("visited", 0))
        self.pending = [[Sample.parse(plain) for plain in step] for step in state.get("pending", [])]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        pending = [[sample.plain() for sample in step] for step in self.pending]
        return {"fetched": self.fetched, "visited": self.visited, "pending": pending}

    def next(self) -> tuple[list[Sample], range]:
        """The samples of the next optimizer step and their numbers, the same on every rank."""
        while not self.pending:
            self.pending = [list(step) for step in self.run.objective.experience(self.run, self._draw())]
        samples = self.pending.pop(0)
        self.visited += len(samples)
        return samples, range(self.visited - len(samples), self.visited)

    def _draw(self) -> list[Drawn]:
        run, count = self.run, self.run.settings.batch.size
        if self.fetched < run.samples_planned:  # the last step of the last epoch may be short
            count = min(count, run.samples_planned - self.fetched)
        rows = [self.order.row(number) for number in range(self.fetched, self.fetched + count)]
        self.fetched += count
        return [Drawn(row, run.splits["train"][row]) for row in rows]

    def skip_to(self, fetched: int, visited: int) -> None:
        """On from a later place, without the pending steps: after a roll-back, what led to it is not met again."""
        self.fetched, self.visited, self.pending = fetched, visited, []
