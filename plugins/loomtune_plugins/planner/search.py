"""Which configurations fit, which of them is best, and what would make one fit: around an `evaluate` that is given.

No torch, and no formula of memory or time: every number is a rehearsal's. What is assumed is an order alone.

- Along every axis of thrift (more ranks, fewer copies, activation checkpointing, offload, smaller micro-batches, ...) a
  rank never needs more memory. So where a configuration does not fit, none that is less thrifty in any way does.
- Some axes of thrift cost time and never gain any. So where a configuration fits, none that only adds such thrift is
  better; and one that only adds thrift to something slower than what is found already is not asked for.

The order of questions is a pure function of the candidates and the answers; only where the time is up, their number
depends on the machine, and the result says how many were left out.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

DOUBT = 0.2
"""Of a guess at the logarithm of a configuration's bytes."""

T = TypeVar("T")
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a configuration comes to.

    bytes: peak of a rank. capacity: of its device. host_bytes, host_capacity: of a node; 0: not known.
    seconds: of a step; tokens_per_second: of all ranks; usd: of a step; each (low, high), None: not known.
    reason: why it is none at all; nothing else counts then. detail: what it was made of.
    """

    bytes: int = 0
    capacity: int = 0
    host_bytes: int = 0
    host_capacity: int = 0
    seconds: Range | None = None
    tokens_per_second: Range | None = None
    usd: Range | None = None
    reason: str = ""
    detail: Any = field(default=None, repr=False, compare=False)

    @property
    def fits_host(self) -> bool:
        """Whether a node's own memory suffices, as far as it is known."""
        return not self.host_capacity or self.host_bytes <= self.host_capacity

    @property
    def fits_device(self) -> bool:
        """Whether the device's memory suffices."""
        return self.bytes <= self.capacity

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return not self.reason and self.fits_device and self.fits_host


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration.

    family: only candidates of one family are compared. thrift: along each axis, more needs no more memory.
    settings: key to value of what it sets. processes: world size. hosted: how much of it lies in host memory (0: none).
    """

    family: str
    thrift: tuple[float, ...]
    settings: tuple[tuple[str, Any], ...]
    processes: int
    hosted: int = 0


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and what it came to."""

    candidate: Candidate
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    ranked: what fits, best first. unfit: what was tried and does not. refused: reason to how many cannot be at all.
    """

    ranked: Sequence[Tried]
    unfit: Sequence[Tried]
    refused: Mapping[str, int]
    candidates: int
    tried: int
    cannot_fit: int
    cannot_be_better: int
    left_out: int
    seconds: float

    @property
    def best(self) -> Tried | None:
        """The best, if any fits."""
        return self.ranked[0] if self.ranked else None


def score(tried: Tried, by: str) -> tuple[float, ...]:
    """What is least for the best. by: `time`, `cost` or `gpus`. A range counts by the root of its ends' product."""
    seconds, usd = (_middle(one) for one in (tried.outcome.seconds, tried.outcome.usd))
    ranks = float(tried.candidate.processes)
    if by == "gpus":
        return ranks, seconds, float(tried.outcome.bytes)
    return (seconds, ranks) if by == "time" else (usd if math.isfinite(usd) else seconds * ranks, seconds)


def _log(number: float) -> float:
    return math.log(number) if 0 < number < math.inf else 100.0


def _middle(of: Range | None) -> float:
    return math.sqrt(max(of[0], 0.0) * max(of[1], 0.0)) if of else math.inf


class Search:
    """A search that can be asked again, so that what was evaluated once is not evaluated again.

    evaluate: of a candidate. slower: for each axis of thrift, whether more of it never makes a step faster.
    best: how many of the best are wanted; what cannot be among them is left alone. seconds: after these no more is
    asked. clock: gives seconds.
    """

    def __init__(
        self,
        evaluate: Callable[[Candidate], Outcome],
        slower: Sequence[bool],
        *,
        by: str = "time",
        best: int = 8,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.evaluate, self.slower, self.by, self.best = evaluate, np.array(slower, dtype=bool), by, best
        self.clock, self.began, self.until = clock, clock(), clock() + seconds
        self.known: dict[Candidate, Outcome] = {}

    def ask(self, candidate: Candidate) -> Outcome:
        """What a candidate comes to; asked once."""
        if candidate not in self.known:
            self.known[candidate] = self.evaluate(candidate)
        return self.known[candidate]

    def run(self, candidates: Sequence[Candidate]) -> Found:
        """The best of these."""
        poset = _Poset(candidates, self.slower)
        tried: dict[int, Tried] = {}
        bound: tuple[float, ...] = (math.inf,)
        while (index := poset.next(_log(bound[0]))) is not None and (not tried or self.clock() < self.until):
            tried[index] = Tried(candidates[index], self.ask(candidates[index]))
            poset.answered(index, tried[index].outcome, _log(score(tried[index], self.by)[0]))
            bound = self._bound(list(tried.values()))
            poset.hopeless([place for place, one in tried.items() if self._worse(one, bound)])
        return self._found(list(tried.values()), poset, len(candidates))

    def _bound(self, tried: Sequence[Tried]) -> tuple[float, ...]:
        """The score of the last that is wanted; nothing is worse while there are fewer."""
        fitting = sorted(score(one, self.by) for one in tried if one.outcome.fits)
        return fitting[self.best - 1] if len(fitting) >= self.best else (math.inf,)

    def _worse(self, one: Tried, bound: tuple[float, ...]) -> bool:
        return not one.outcome.reason and score(one, self.by) >= bound

    def _found(self, tried: Sequence[Tried], poset: _Poset, candidates: int) -> Found:
        refused: dict[str, int] = {}
        for one in tried:
            if one.outcome.reason:
                refused[one.outcome.reason] = refused.get(one.outcome.reason, 0) + 1
        fitting = sorted((t for t in tried if t.outcome.fits), key=lambda t: (score(t, self.by), t.candidate.thrift))
        unfit = [one for one in tried if not one.outcome.reason and not one.outcome.fits]
        counts = (candidates, len(tried), poset.cannot_fit, poset.cannot_be_better, poset.open)
        return Found(fitting, unfit, refused, *counts, seconds=self.clock() - self.began)


class _Poset:
    """Candidates, the order between them, and which of them are still open."""

    def __init__(self, candidates: Sequence[Candidate], slower: np.ndarray[Any, Any]) -> None:
        numbers = {family: number for number, family in enumerate(dict.fromkeys(one.family for one in candidates))}
        families = np.array([numbers[one.family] for one in candidates])
        thrift = np.array([one.thrift for one in candidates], dtype=float).reshape(len(candidates), len(slower))
        self.hosted = np.array([one.hosted for one in candidates])
        kin = families[:, None] == families[None, :]
        # [x, y]: y is at most as thrifty as x in everything; y is x with more of what only costs time.
        self.below = kin & (thrift[None, :, :] <= thrift[:, None, :]).all(-1)
        more = (thrift[None, :, :] >= thrift[:, None, :])[:, :, slower].all(-1)
        same = (thrift[None, :, :] == thrift[:, None, :])[:, :, ~slower].all(-1)
        self.costlier = kin & more & same
        np.fill_diagonal(self.costlier, False)
        self.alive = np.ones(len(candidates), dtype=bool)
        self.sure = dict.fromkeys(families, False)
        self.families = families
        self.cannot_fit = self.cannot_be_better = 0
        levels = [np.unique(column) for column in (*thrift.T, families)]
        steps = [column[:, None] == level for column, level in zip((*thrift.T, families), levels, strict=True)]
        self.steps = np.concatenate(steps, axis=1).astype(float)
        self.bytes: dict[int, float] = {}  # logarithms of what was answered
        self.worth: dict[int, float] = {}
        self.capacity = 0.0

    @property
    def open(self) -> int:
        return int(self.alive.sum())

    def next(self, bound: float) -> int | None:
        """The question whose answer will probably close most others; of a family first its thriftiest."""
        if not self.alive.any():
            return None
        below = (self.below & self.alive).sum(1)
        for family, sure in self.sure.items():
            of = self.alive & (self.families == family)
            if not sure and of.any():
                return int(np.argmax(np.where(of, below, -1)))
        costlier = (self.costlier & self.alive).sum(1) + 1
        fits = 1 / (1 + np.exp(np.clip((self._guessed(self.bytes) - self.capacity) / DOUBT, -20, 20)))
        slow = self._guessed(self.worth) >= bound
        closes = (1 - fits) * below + np.where(slow, 1, fits) * costlier
        return int(np.argmax(np.where(self.alive, closes, -1)))

    def _guessed(self, known: Mapping[int, float]) -> np.ndarray[Any, Any]:
        """The logarithm of a number of every candidate, as a sum of what each step on each axis adds: ridge regression
        on those that are known. It decides nothing but the order of questions."""
        if not known:
            return np.zeros(len(self.alive))
        rows, values = self.steps[list(known)], np.array(list(known.values()))
        mean = values.mean()
        weights = np.linalg.solve(rows.T @ rows + 0.05 * np.eye(rows.shape[1]), rows.T @ (values - mean))
        guess: np.ndarray[Any, Any] = mean + self.steps @ weights
        return guess

    def answered(self, index: int, outcome: Outcome, worth: float) -> None:
        self.alive[index] = False
        if outcome.reason:
            return
        self.capacity, self.bytes[index] = math.log(max(1, outcome.capacity)), math.log(max(1, outcome.bytes))
        self.worth[index] = worth
        if outcome.fits:
            self.sure[self.families[index]] = True
            self.cannot_be_better += self._close(self.costlier[index])
        elif not outcome.fits_device:
            self.cannot_fit += self._close(self.below[index])
        else:  # a node's memory: what offloads less may still fit
            self.cannot_fit += self._close(self.below[index] & (self.hosted == self.hosted[index]))

    def hopeless(self, indices: Sequence[int]) -> None:
        """What only adds to the time of these is no better than what is known."""
        for index in indices:
            self.cannot_be_better += self._close(self.costlier[index])

    def _close(self, these: np.ndarray[Any, Any]) -> int:
        closed = int((self.alive & these).sum())
        self.alive &= ~these
        return closed


def fewest(
    worlds: Sequence[int], lean: Callable[[int], Sequence[T]], fits: Callable[[T], bool]
) -> tuple[int, T] | None:
    """The smallest world in which something fits, and what; None where nothing does in any.

    worlds: ascending. lean: the thriftiest that there are in a world, any of which may fit. More ranks are taken never
    to need more memory each: worlds are asked in steps that double until one fits, and halved back.
    """
    best: tuple[int, T] | None = None
    low, high, step = 0, len(worlds), 1
    while low < high:
        middle = (low + high) // 2 if best else min(low + step - 1, high - 1)
        first = next((one for one in lean(worlds[middle]) if fits(one)), None)
        if first is None:
            low, step = middle + 1, 2 * step
        else:
            best, high = (worlds[middle], first), middle
    return best


@dataclass(frozen=True, slots=True)
class Move(Generic[T]):
    """A change that saves memory. keys: of what it sets; two that set the same do not go together."""

    label: str
    keys: frozenset[str]
    change: T


def remedies(
    moves: Sequence[Move[T]],
    fits: Callable[[tuple[Move[T], ...]], bool],
    *,
    most: int = 3,
    together: int = 3,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[Move[T], ...]]:
    """The nearest changes that make a run fit: single ones in the order given, then two together, then more.

    None that contains another that suffices. fits: of these changes together.
    """
    found: list[tuple[Move[T], ...]] = []
    until = clock() + seconds
    for chosen in _together(moves, together):
        if len(found) == most or clock() >= until:
            break
        if not any(set(one) <= set(chosen) for one in found) and fits(chosen):
            found.append(chosen)
    return found


def _together(moves: Sequence[Move[T]], most: int) -> Iterator[tuple[Move[T], ...]]:
    for count in range(1, most + 1):
        for chosen in itertools.combinations(moves, count):
            keys = [key for move in chosen for key in move.keys]
            if len(set(keys)) == len(keys):
                yield chosen
