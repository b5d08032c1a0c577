"""Hands out the samples of each optimizer step.

What a step holds is a function of how many rows were drawn before it; where and when one is computed is decided later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Drawn, Sample
from loomtune.errors import Preempted, UserError

if TYPE_CHECKING:
    from loomtune.run import Run
    from loomtune.streaming import Stream


class Feed:
    """Draws rows, and hands out the optimizer steps that the objective makes of them.

    fetched: rows drawn so far. visited: samples handed out so far; a sample's number among them seeds its dropout.
    pending: steps that were made of drawn rows and are not trained on yet.
    stream: what draws the rows of data that stream; without it their first window is taken for all.
    """

    def __init__(self, run: Run, stream: Stream | None = None) -> None:
        self.run, self.stream = run, stream
        run.draw = self.draw
        self.set({})

    def set(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        self.fetched, self.visited = int(state.get("fetched", 0)), int(state.get("visited", 0))
        pending = state.get("pending") or {"samples": [], "steps": []}
        samples = [Sample.parse(plain) for plain in pending["samples"]]
        self.pending = [[samples[place] for place in step] for step in pending["steps"]]
        if self.stream:
            self.stream.set(state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: of samples that several steps learn from, one copy."""
        each = {id(sample): sample for step in self.pending for sample in step}
        places = {key: place for place, key in enumerate(each)}
        steps = [[places[id(sample)] for sample in step] for step in self.pending]
        pending = {"samples": [sample.plain() for sample in each.values()], "steps": steps}
        place = self.stream.state() if self.stream else {}
        return {"fetched": self.fetched, "visited": self.visited, "pending": pending, **place}

    def fetch(self) -> None:
        """Has what the next step needs, before it begins: what cannot be had leaves nothing drawn."""
        if self.pending:
            return
        before = self.state()
        try:
            while not self.pending:
                self.pending = [list(step) for step in self.run.objective.experience(self.run, self.draw())]
        except (Preempted, UserError):
            self.set(before)
            raise

    def next(self) -> tuple[list[Sample], range]:
        """The samples of the next optimizer step and their numbers, the same on every rank."""
        self.fetch()
        samples = self.pending.pop(0)
        self.visited += len(samples)
        return samples, range(self.visited - len(samples), self.visited)

    def draw(self) -> list[Drawn]:
        """The rows that come next: of one step, or of all that the objective makes of these."""
        if self.stream:
            drawn = self.stream.draw(self.fetched, self.run.settings.batch.size)
            self.fetched += len(drawn)
            return drawn
        rows, samples = self.run.sampler.step(self.fetched), self.run.splits["train"]
        self.fetched += len(rows)
        numbers = range(self.fetched - len(rows), self.fetched)
        return [Drawn(row, samples[row], samples.row(row), visit) for row, visit in zip(rows, numbers, strict=True)]

    def close(self) -> None:
        """No more rows are drawn."""
        if self.stream:
            self.stream.close()
