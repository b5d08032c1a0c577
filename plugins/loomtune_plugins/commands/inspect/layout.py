"""How full batches are, counted on the very batches that a run would be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil

from loomtune.run import Run
from loomtune.session import collated, drawn
from loomtune_plugins.commands.inspect.reading import filled

MOST_STEPS = 200
MOST_ROWS = 4096
"""So many steps, or as many as have so many rows, are laid out to see how full they are."""


@dataclass(frozen=True, slots=True)
class Filling:
    """tokens, places: of all batches, where a place without a token is padding. batches: micro-batches of all ranks."""

    tokens: int
    places: int
    batches: int

    @property
    def efficiency(self) -> float:
        """Share of places that hold a token."""
        return self.tokens / self.places if self.places else 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """steps, rows: how many were laid out, the first of the run. epoch, run: steps of one and in all.

    An epoch's are foretold from the first steps where lengths decide on what a step holds; of a stream nobody knows.
    """

    steps: int
    rows: int
    epoch: int
    run: int
    plain: Filling
    packed: Filling


def layout(run: Run, split: str) -> Layout:
    """Lays out the first steps of a run twice, packed and not."""
    size, trained = run.settings.batch.size, split == "train"
    visits = run.sampler.order.length(1) if trained else len(run.splits[split])
    most = min(max(1, MOST_ROWS // size), MOST_STEPS, -(-visits // size))
    steps = list(islice(drawn(run, split), most)) if visits else []
    rows = sum(map(len, steps))
    each = rows / len(steps) if steps and trained and run.settings.batch.sampler == "packed" else size
    epoch = 0 if trained and run.data.window else ceil(visits / each)
    plain, packed = (_filling(run, split, steps, packing=packing) for packing in (False, True))
    return Layout(len(steps), rows, epoch, run.steps if trained else epoch, plain, packed)


def _filling(run: Run, split: str, steps: Sequence[Sequence[int]], *, packing: bool) -> Filling:
    laid = replace(run, settings=replace(run.settings, packing=packing))
    found = [filled(batch) for rows in steps for batch in collated(laid, split, rows)]
    return Filling(sum(tokens for tokens, _ in found), sum(places for _, places in found), len(found))
