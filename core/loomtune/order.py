"""Which rows a run visits, one after the other: a pure function of (seed, epoch, index), the same on every rank."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Data
from loomtune.samples import Samples
from loomtune.seeds import derive
from loomtune.settings import Settings

Rows = NDArray[np.integer[Any]]

REPEATS = 4
"""How often an epoch may visit a row before it is told: up to four times, what is repeated is worth nearly as much as
what is new (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", section 6)."""

TOGETHER = 64
"""Of a source that an epoch goes through oftener, several passes are drawn together, by at most twice as many draws."""


@dataclass(frozen=True, slots=True)
class Share:
    """A source among those of a split: how many rows it has, and how often an epoch visits it."""

    name: str
    rows: int
    visits: Fraction

    def __str__(self) -> str:
        digits = 0 if self.visits.denominator == 1 else 1
        return f"{float(self.visits):,.{digits}f} to {self.name} ({self.rows:,} rows)"

    def before(self, epoch: int) -> int:
        """Visits before an epoch: a share that is no whole number comes out even over several."""
        return floor(epoch * self.visits)


@dataclass(frozen=True, slots=True)
class Order:
    """The endless sequence of visits: epoch after epoch, each in an order of its own. Number of a visit -> row.

    An epoch visits each source as often as its share says, in a permutation over all visits; the k-th visit of a source
    is the k-th of the source's own endless permutations. One source alone has no permutation but these.
    shuffled: False: rows as they lie, source after source, in every epoch.
    """

    seed: int
    shares: tuple[Share, ...]
    shuffled: bool = True

    @classmethod
    def of(cls, settings: Settings, train: Samples, data: Data) -> Order:
        """That of a run. Raises UserError where a source that is to be visited has no rows."""
        visits = data.visits(train.sources)
        shares = tuple(Share(name, count, visits[name]) for name, count in train.sources.items())
        return cls(settings.seed, shares, settings.batch.sampler != "sequential")

    def before(self, epoch: int) -> int:
        """How many visits there are before an epoch."""
        return sum(share.before(epoch) for share in self.shares)

    def length(self, epochs: float) -> int:
        """Visits of so many epochs."""
        return self.before(int(epochs)) if epochs == int(epochs) else round(float(self._each) * epochs)

    def epoch(self, number: int) -> int:
        """In which epoch a visit is, counted from 0. Each share is rounded down: late by less than a visit."""
        latest = ceil((number + 1 + len(self.shares)) / self._each)
        return bisect_right(range(latest + 1), number, lo=int(number // self._each), key=self.before) - 1

    def rows(self, begin: int, end: int) -> Rows:
        """The rows of consecutive visits, `(end - begin,)`."""
        found = [np.zeros(0, np.int64)]
        while begin < end:
            epoch = self.epoch(begin)
            first, next_one = self.before(epoch), self.before(epoch + 1)
            found.append(_visited(self, epoch)[begin - first : end - first].astype(np.int64))  # a copy lets the rest go
            begin = next_one
        return np.concatenate(found)

    @property
    def _each(self) -> Fraction:
        """Visits of an epoch, on the average."""
        return sum((share.visits for share in self.shares), Fraction())


@lru_cache(maxsize=1)
def _visited(order: Order, epoch: int) -> Rows:
    """The rows that an epoch visits, in its order: 4 bytes a visit, 8 from 2^31 rows on."""
    first, parts = 0, []
    for share in order.shares:
        rows = _of_source(order, share, share.before(epoch), share.before(epoch + 1))
        parts.append(rows + first if first else rows)
        first += share.rows
    if len(parts) == 1:
        return parts[0]
    visited = np.concatenate(parts)
    return visited[permutation(len(visited), order.seed, "order", epoch)] if order.shuffled else visited


def _of_source(order: Order, share: Share, begin: int, end: int) -> Rows:
    """The rows, within their source, of its visits `begin` to `end`.

    Of a source that an epoch goes through very often, many passes are drawn at once: a generator takes longer to begin
    than a few rows to permute.
    """
    together = max(1, int(share.visits / share.rows) // TOGETHER)
    first, last = begin // (share.rows * together), -(-end // (share.rows * together))
    if order.shuffled:
        named = (share.name,) if share.name else ()
        passes = [permutation(share.rows, order.seed, "order", *named, n, times=together) for n in range(first, last)]
    else:
        passes = [np.tile(_below(share.rows), together * (last - first))]
    whole, skipped = np.concatenate(passes or [_below(0)]), first * share.rows * together
    return whole[begin - skipped : end - skipped]


def _below(count: int) -> Rows:
    """The numbers below `count`, as they come."""
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)


def permutation(count: int, *seed: object, times: int = 1) -> Rows:
    """The numbers below `count`, so many times, each in an order of its own that depends on what is named alone."""
    rows = np.tile(_below(count), (times, 1))
    return np.random.default_rng(derive(*seed)).permuted(rows, axis=1, out=rows).reshape(-1)
