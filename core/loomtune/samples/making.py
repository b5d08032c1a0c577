"""From rows to samples, a batch of rows at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loomtune.contracts import Data, Dropped, Objective, Row, Sample, Tokenizer
from loomtune.contracts.batch import NO_PARENT
from loomtune.contracts.objective import UNCUT
from loomtune.errors import UserError
from loomtune.samples.stored import COLUMNS, FORMAT, Writer
from loomtune.settings import from_environment

SHOWN = 5
"""How many rows that cannot be learned from are told one by one."""

LEAVES_OUT = 0.01
"""Largest share of rows that may be left out because `max_length` cuts their whole answer; beyond, it is a mistake."""

BAD_ROWS = "LOOMTUNE_BAD_ROWS"
"""Names another share of a window's rows; no setting, since it is to be changed in the midst of a run."""

TOGETHER = 128
"""Rows of a batch."""


@dataclass(frozen=True, slots=True)
class Source:
    """All that the samples of a split are made of. max_length: tokens of the longest chain.

    window: how many rows are made into samples at a time; 0: all.
    """

    data: Data
    objective: Objective
    tokenizer: Tokenizer
    split: str
    max_length: int
    window: int = 0

    @property
    def key(self) -> str:
        """Digest of everything that the samples depend on."""
        made_of = self.data.fingerprint(), self.split, self.objective.fingerprint(), self.tokenizer.fingerprint
        return hashlib.sha256(json.dumps([FORMAT, *made_of, self.max_length, self.window]).encode()).hexdigest()

    @property
    def encoder(self) -> Encoder:
        """What makes samples of rows, wherever they were read."""
        return Encoder(self.objective, self.tokenizer, self.max_length)


Item = tuple[str, str, Row | Dropped]
"""(where a row was read, of which source it is, the row)."""


@dataclass
class Refusals:
    """Rows that cannot be learned from: all are counted, the first are remembered."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, origin: str, reason: str) -> None:
        """Remembers one."""
        self.join(Refusals(1, [f"\n  {origin}: {reason}"]))

    def join(self, other: Refusals) -> None:
        """Takes over what another remembered."""
        self.count, self.first = self.count + other.count, [*self.first, *other.first][:SHOWN]

    def told(self, rows: int, split: str) -> str:
        """In words."""
        more = f"\n  and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return f"{self.count} of {rows} rows of {split} cannot be learned from:{''.join(self.first)}{more}"


class Part:
    """What rows became. columns: as `Writer.add` takes them. counts: of rows that were cut, and by how many tokens."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {name: [] for name in COLUMNS}
        self.counts = Counter(cut=0, cut_tokens=0)
        self.sources: dict[str, int] = {}
        self.names: list[str] | None = None
        self.largest = -1
        self.refusals, self.cut_away = Refusals(), Refusals()

    def add(self, sample: Sample, origin: str, of: str, lost: int, row: str = "") -> None:
        """Appends a sample. of: its source; those of one come together. lost: tokens that were cut off. row: JSON."""
        self.sources[of] = self.sources.get(of, 0) + 1
        names = list(sample.numbers)
        assert names == (self.names or names), "an objective gives every sample the same numbers, in the same order"
        self.names = names
        for segment in sample.segments:
            self._put("tokens", segment.tokens)
            self._put("is_target", segment.is_target)
        self._put("token_starts", [len(segment.tokens) for segment in sample.segments])
        self._put("parents", [segment.parent for segment in sample.segments])
        self._put("segment_starts", [len(sample.segments)])
        self._put("lengths", [sample.length])
        self._put("numbers", list(sample.numbers.values()))
        for name, text in (("origin", origin.encode()), ("row", row.encode())):
            self._put(f"{name}s", np.frombuffer(text, np.uint8))
            self._put(f"{name}_starts", [len(text)])
        self.counts.update(cut=int(lost > 0), cut_tokens=lost)
        self.largest = max(self.largest, *(int(segment.tokens.max(initial=-1)) for segment in sample.segments))

    def joined(self) -> Part:
        """With each column as one array."""
        for name, kind in COLUMNS.items():
            self.columns[name] = np.concatenate([np.zeros(0, kind), *self.columns[name]])
        return self

    def join(self, other: Part) -> None:
        """Takes over what is known of the rows that follow; not their columns."""
        for of, count in other.sources.items():
            self.sources[of] = self.sources.get(of, 0) + count
        assert None in (self.names, other.names) or self.names == other.names, "every sample has the same numbers"
        self.names = other.names if self.names is None else self.names
        self.counts.update(other.counts)
        self.largest = max(self.largest, other.largest)
        self.refusals.join(other.refusals)
        self.cut_away.join(other.cut_away)

    def _put(self, name: str, values: Any) -> None:
        self.columns[name].append(np.asarray(values, COLUMNS[name]))


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes samples of rows; goes to other processes."""

    objective: Objective
    tokenizer: Tokenizer
    max_length: int

    def part(self, items: Sequence[Item]) -> Part:
        """What rows become. A batch by itself gives what it gives among others, in whatever process."""
        part = Part()
        for origin, of, row in items:
            try:
                if isinstance(row, Dropped):
                    raise ValueError(row.detail or row.reason)
                made, lost = self.samples(row)
            except ValueError as error:
                part.refusals.add(origin, str(error))
                continue
            kept = json.dumps(row, default=str) if self.objective.keeps_rows() else ""
            for sample in made:
                if sample.targets or not self.objective.needs_targets():
                    part.add(sample, origin, of, lost, kept)
                else:
                    (part.cut_away if lost else part.refusals).add(origin, self._why_no_target(lost))
        return part.joined()

    def samples(self, row: Row) -> tuple[Sequence[Sample], int]:
        """A row's samples, and how many tokens the cut took. Raises ValueError where the row cannot be learned from.

        Only a sample by itself that fills `max_length` can have lost any, and is made again uncut.
        """
        made = self.objective.samples(row, self.tokenizer, self.max_length)
        if len(made) > 1 or chain(made[0]) < self.max_length:
            return made, 0
        return made, self.objective.sample(row, self.tokenizer, UNCUT).length - made[0].length

    def _why_no_target(self, lost: int) -> str:
        if lost:
            return f"nothing is left to learn once its {lost} last tokens are cut off by max_length={self.max_length}"
        return "has nothing to learn: its answer is empty"


def chain(sample: Sample) -> int:
    """Tokens of the longest chain of segments, from one without a parent to its last descendant."""
    ends: list[int] = []
    for segment in sample.segments:
        before = 0 if segment.parent == NO_PARENT else ends[segment.parent]
        ends.append(before + len(segment.tokens))
    return max(ends, default=0)


class Rows:
    """The rows of a source: those of the whole split, or from a place of it on one window after the other.

    next: the place where the window after the one that was taken begins; None where the data are at their end.
    """

    def __init__(self, source: Source, place: Any = None) -> None:
        self._source, self.next = source, place
        self._found = source.data.stream(place) if source.window else iter(())
        self._ahead = next(self._found, None)

    def take(self) -> Iterator[Row | Dropped]:
        """Those of the next window, or all of them."""
        if not self._source.window:
            yield from self._source.data.rows(self._source.split)
        for _ in range(self._source.window):
            if self._ahead is not None:
                row, self.next = self._ahead
                self._ahead = next(self._found, None)
                yield row
        self.next = None if self._ahead is None else self.next


Parts = Callable[[Iterator[Sequence[Item]]], Iterable[Part]]
"""How batches of rows become samples, in their order."""


def fill(folder: Path, source: Source, rows: Rows, parts: Parts) -> None:
    """Tokenises the rows of a split, or its next window, into a folder.

    Raises UserError, which names rows, once all were seen: where one of a whole split cannot be learned from, or more
    than a small share of a window.
    """
    whole, count, seen, least = Part(), 0, list[str](), 0 if rows.next is None else source.window

    def batches() -> Iterator[Sequence[Item]]:
        nonlocal count
        left = rows.take()
        while batch := list(itertools.islice(left, TOGETHER)):
            yield [_item(source, row, number, seen) for number, row in enumerate(batch, start=count + 1)]
            count += len(batch)

    writer = Writer(folder)
    try:
        for part in parts(batches()):
            writer.add(part.columns)
            whole.join(part)
        _refuse(whole, source, count, max(count, least))
        told = whole.refusals.told(count, f"a window of {source.split}") if whole.refusals.count else ""
        skipped = 0 if source.window else whole.cut_away.count
        about = {**whole.counts, "skipped": skipped, "told": told, "sources": whole.sources, "names": whole.names or []}
        left_out = list(source.data.left_out(source.split))
        writer.finish({**about, "largest_token": whole.largest, "left_out": left_out, "next": rows.next})
    finally:
        writer.close()


def _item(source: Source, row: Row | Dropped, number: int, seen: list[str]) -> Item:
    """seen: the sources so far. Raises UserError where data that mix break what `Data.mixes` says of them."""
    if isinstance(row, Dropped):
        return row.origin, "", row
    origin, of = str(row.get("origin", f"{source.split}:{number}")), row.get("source") if source.data.mixes else ""
    if of is None or of in seen[:-1]:
        what = "does not say of which source it is" if of is None else f"is of {of} again, after rows of {seen[-1]}"
        raise UserError.of(f"{origin} {what}", "this is a mistake of the data's plugin: `Data.mixes` says what it owes")
    seen += [] if seen[-1:] == [of] else [str(of)]
    return origin, str(of), row


def _refuse(whole: Part, source: Source, count: int, of: int) -> None:
    """of: how many rows a share is of; a last, short window counts as a full one."""
    allowed = LEAVES_OUT * count
    if source.window:
        allowed = max(1.0, from_environment(BAD_ROWS, LEAVES_OUT, least=0, most=1) * of)
    if source.window or whole.cut_away.count > allowed:
        whole.refusals.join(whole.cut_away)
    if whole.refusals.count > (allowed if source.window else 0):
        cure = "mend these rows, read them otherwise, or take them out; where max_length cut answers away, raise it"
        if source.window:
            share = math.ceil(100 * whole.refusals.count / of) / 100
            cure = f"{BAD_ROWS}={share} leaves them out, and a run goes on with it; in another run: {cure}"
        raise UserError.of(whole.refusals.told(count, f"split {source.split}"), cure)
