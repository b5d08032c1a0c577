"""What a batch says, row by row: which tokens are given and which are learned, read from the batch alone.

Nothing is taken from the samples' own masks: what is shown is what a loss would be given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT

CONTEXT = 8
"""Tokens of the part before that are needed to spell a part's first one."""


@dataclass(frozen=True, slots=True)
class Part:
    """A segment.

    number: which of its sample's. tokens: as a model reads them; learned ones as they are asked for. learned: of each,
    whether it is a target. before: what comes right before.
    """

    number: int
    tokens: list[int]
    learned: list[bool]
    before: list[int]


@dataclass(frozen=True, slots=True)
class Document:
    """A sample in its batch, what several answers share drawn once. number: its place in the step."""

    number: int
    parts: list[Part]
    numbers: Mapping[str, float]

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(len(part.tokens) for part in self.parts)

    @property
    def learned(self) -> int:
        """Those of them that are targets."""
        return sum(sum(part.learned) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a batch, or the rows that one sample takes. tokens: without padding. width: of the batch."""

    documents: list[Document]
    tokens: int
    width: int


def lines(batches: Sequence[Batch]) -> list[Line]:
    """The rows of a step, in the order of its samples."""
    found = [line for batch in batches for line in _lines(batch)]
    return sorted(found, key=lambda line: line.documents[0].number)


def filled(batch: Batch) -> tuple[int, int]:
    """(tokens, places) of a batch."""
    return int((batch.segments != NO_SEGMENT).sum()), batch.tokens.numel()


def _lines(batch: Batch) -> Iterator[Line]:
    owners, numbers = batch.sample_of_segment.tolist(), batch.sample_numbers.tolist()
    parts = _parts(batch)
    columns = {name: values for name, values in batch.columns.items() if values.shape == batch.sample_numbers.shape}
    rows: dict[tuple[int, ...], list[int]] = {}  # the batch's rows that share a sample
    of_row = {row: _owners(batch, owners, row) for row in range(len(batch.tokens))}
    for row, here in of_row.items():
        if here:
            rows.setdefault(here, []).append(row)
    for here, taken in rows.items():
        documents = []
        for owner in here:
            own = {parts[s].number: parts[s] for s in reversed(range(len(owners))) if owners[s] == owner}
            said = {name: float(values[owner]) for name, values in columns.items()}
            documents.append(Document(numbers[owner], [own[number] for number in sorted(own)], said))
        yield Line(documents, int((batch.segments[taken] != NO_SEGMENT).sum()), batch.tokens.shape[1])


def _owners(batch: Batch, owners: Sequence[int], row: int) -> tuple[int, ...]:
    """The samples in a row of the batch, in their order."""
    segments = batch.segments[row]
    return tuple(dict.fromkeys(owners[s] for s in segments[segments != NO_SEGMENT].tolist()))


def _parts(batch: Batch) -> list[Part]:
    """Every segment. A target stands behind the place that predicts it, or first where that is in another segment."""
    places = batch.segments.flatten().numpy()
    tokens, learned = batch.tokens.flatten().numpy().copy(), np.zeros(len(places), np.bool_)
    where = _spans(places, len(batch.parents))
    from_, of = batch.predict_from.numpy(), batch.row.numpy()
    first = np.array([span.start for span in where], np.int64)
    at = np.where(places[from_] == of, from_ + 1, first[of])
    tokens[at], learned[at] = batch.target.numpy(), True
    parents = batch.parents.tolist()
    made = []
    for number, span, parent in zip(batch.part.tolist(), where, parents, strict=True):
        before = [] if parent == NO_PARENT else tokens[where[parent]][-CONTEXT:].tolist()
        made.append(Part(number, tokens[span].tolist(), learned[span].tolist(), before))
    return made


def _spans(places: NDArray[np.int64], segments: int) -> list[slice]:
    """Where each segment lies among the flat places of a batch; an empty one nowhere."""
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(segments + 1))
    return [slice(int(order[a]), int(order[b - 1]) + 1) if b > a else slice(0, 0) for a, b in pairwise(starts)]
