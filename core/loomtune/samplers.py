"""How many rows of the run's order make each optimizer step, and so how many steps there are."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Data, Objective
from loomtune.errors import UserError
from loomtune.order import Order
from loomtune.placement import fitted
from loomtune.samples import Samples
from loomtune.seeds import derive
from loomtune.settings import Settings

WINDOW = 8192
"""Visits that are packed together: rows fill up, and no more than these are looked ahead."""


class Sampler(Protocol):
    """Makes steps of consecutive visits. A step is a function of the number of its first visit, whoever asks.

    end: visits of all epochs, the last step of which may be short; 0: nothing but the number of steps ends the run.
    """

    order: Order
    end: int

    def step(self, begin: int) -> list[int]:
        """The rows of the step that begins with a visit."""

    def steps(self) -> int:
        """How many steps the visits of all epochs make."""


class Counted:
    """Steps of `size` rows."""

    def __init__(self, order: Order, size: int, end: int) -> None:
        self.order, self._size, self.end = order, size, end

    def step(self, begin: int) -> list[int]:
        """The next rows of the order."""
        last = begin + self._size
        rows: list[int] = self.order.rows(begin, min(last, self.end) if begin < self.end else last).tolist()
        return rows

    def steps(self) -> int:
        """As many as rows need."""
        return math.ceil(self.end / self._size)


class Packed:
    """Steps of as many samples as fill `size` rows of `width` tokens.

    The visits of a window of an epoch are packed by best fit, longest first, and their packs put into an order of their
    own. So a step holds more or fewer samples, as they are shorter or longer.
    """

    def __init__(self, order: Order, size: int, end: int, lengths: NDArray[np.int64], width: int) -> None:
        self.order, self._size, self.end = order, size, end
        self._lengths, self._width = lengths, width
        self._last: tuple[int, list[list[int]]] = (-1, [])

    def step(self, begin: int) -> list[int]:
        """The samples of the next `size` packs, of this window and of those after it."""
        rows: list[int] = []
        count = 0
        while count < self._size and (begin != self.end or not count):
            first, last = self._window(begin)
            packs = self._packs(first, last)
            starts = list(accumulate(map(len, packs), initial=first))
            at = starts.index(begin)
            taken = packs[at : at + self._size - count]
            count, begin = count + len(taken), starts[at + len(taken)]
            rows += [row for pack in taken for row in pack]
        return rows

    def steps(self) -> int:
        """Packs every window of every epoch, a second for some 300,000 visits: done once, before there are ranks."""
        begin = packs = 0
        while begin < self.end:
            first, begin = self._window(begin)
            packs += len(self._packs(first, begin))
        return math.ceil(packs / self._size)

    def _window(self, number: int) -> tuple[int, int]:
        """First visit and end of the window that a visit is in; no window reaches over an epoch, or over the run."""
        epoch = self.order.epoch(number)
        first = self.order.before(epoch)
        first += (number - first) // WINDOW * WINDOW
        last = min(first + WINDOW, self.order.before(epoch + 1))
        if first < self.end <= number:
            first = self.end
        return first, min(last, self.end) if number < self.end else last

    def _packs(self, first: int, last: int) -> list[list[int]]:
        """A window's rows, pack by pack."""
        if self._last[0] != first:
            rows = self.order.rows(first, last)
            lengths = self._lengths[rows].tolist()
            packs = fitted(sorted(range(len(rows)), key=lambda i: -lengths[i]), lengths, self._width)
            turns = np.random.default_rng(derive(self.order.seed, "packs", first)).permutation(len(packs))
            self._last = first, [rows[packs[turn]].tolist() for turn in turns]
        return self._last[1]


def sampler(settings: Settings, train: Samples, data: Data, width: int) -> Sampler:
    """The one that the settings name. width: tokens of a row that is packed. Raises UserError where a sample is longer.

    Where `steps` are set, no epoch ends a run.
    """
    order, size = Order.of(settings, train, data), settings.batch.size
    if settings.batch.sampler != "packed":
        return Counted(order, size, settings.steps * size or order.length(settings.epochs))
    if train.lengths.max(initial=0) > width:
        longest = int(train.lengths.argmax())
        raise UserError.of(
            f"batch.sampler=packed: {train.origin(longest)} has {train.lengths[longest]} tokens in all its parts, and "
            f"a row has {width}",
            "raise max_length, or set batch.sampler=shuffled",
        )
    return Packed(order, size, 0 if settings.steps else order.length(settings.epochs), train.lengths, width)


def suits(settings: Settings, objective: Objective) -> None:
    """Raises UserError where the sampler cannot make steps of what the objective computes."""
    if settings.batch.sampler == "packed" and objective.online():
        raise UserError.of(
            "batch.sampler=packed packs what the files hold, but the objective makes its samples while it trains",
            "set batch.sampler=shuffled",
        )


def steps(settings: Settings, chosen: Sampler, objective: Objective) -> int:
    """Optimizer steps of the whole run. Raises UserError where there would be none."""
    if found := settings.steps or chosen.steps() * objective.steps_per_batch():
        return found
    rows = sum(share.rows for share in chosen.order.shares)
    what = f"epochs={settings.epochs:g} visits none of {rows} rows: nothing would be trained"
    raise UserError.of(what, "raise epochs, or the shares of data.sources, or set steps=")
