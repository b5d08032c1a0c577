"""Who computes which samples of a step, in which micro-batch and row. Nothing here may change the maths."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from loomtune.contracts import Model, Placement, Sample
from loomtune.contracts.batch import NO_PARENT
from loomtune.settings import Settings


@dataclass(frozen=True, slots=True)
class MicroLimit:
    """How much a rank computes at once: at most so many rows, and (0: any number) so many tokens, padding included.

    packed: tokens of a row into which several samples are laid; 0: each sample has a row of its own.
    share: whether answers to one prompt share its computation; None: where it pays.
    """

    rows: int
    tokens: int = 0
    packed: int = 0
    share: bool | None = None


PAIRS = 800
"""Pairs of query and key whose attention costs as much as one token's linear layers.

This and the next two: measured on a CPU with `model=llama_35m`, forward and backward (`docs/benchmarks.md`). In wider
models linear layers weigh more (they grow with the square of the width): sharing pays earlier than predicted.
"""

PRICE = 1.45
"""Cost of a pair of query and key that a mask lets through, over one where attention is plainly causal."""

SEGMENT = 3
"""Tokens through linear layers that a segment costs which attends by itself."""


def row_width(settings: Settings, model: Model, virtual: int) -> int:
    """Tokens of the longest sample, and of a row of several. virtual: what the adapter takes of the model's context."""
    return settings.max_length or model.context() - virtual


def laid_out(samples: Sequence[Sample], limit: MicroLimit) -> Sequence[Sample]:
    """A step's samples as they are computed: as they are where answers share their prompt, else unfolded.

    Packed rows need a mask in either form.
    """
    if limit.share or all(len(sample.segments) == 1 for sample in samples):
        return samples
    unfolded = [sample.unfolded() for sample in samples]
    pays = _work(samples, limit, masked=True) < _work(unfolded, limit, masked=limit.packed > 0)
    return samples if limit.share is None and pays else unfolded


def _work(samples: Sequence[Sample], limit: MicroLimit, *, masked: bool) -> float:
    """Predicted, in tokens through linear layers, a sample's own padding included: an answer's to the longer one.

    Masked: a segment meets what it sees; else a row meets itself.
    """
    through = sum(tokens(sample, limit) for sample in samples)
    if masked:
        return through + PRICE / PAIRS * sum(map(_seen, samples)) + SEGMENT * sum(len(s.segments) for s in samples)
    return through + sum(len(s.trees) * max(s.trees, default=0) ** 2 for s in samples) / PAIRS


def _seen(sample: Sample) -> int:
    """Tokens times tokens that their segment sees: its own and its ancestors'."""
    through: list[int] = []
    for segment in sample.segments:
        above = 0 if segment.parent == NO_PARENT else through[segment.parent]
        through.append(above + len(segment.tokens))
    return sum(len(segment.tokens) * seen for segment, seen in zip(sample.segments, through, strict=True))


def tokens(sample: Sample, limit: MicroLimit) -> int:
    """What a sample takes of a micro-batch: in a row with others its tokens, else rows as long as its longest tree."""
    return sample.length if limit.packed else len(sample.trees) * max(sample.trees, default=0)


def place(numbers: Sequence[int], lengths: Sequence[int], replicas: int, limit: MicroLimit) -> list[list[Placement]]:
    """Micro-batches of every replica: rows sorted by length, so that little is padded, and dealt out evenly.

    numbers, lengths: of the step's samples. Every replica gets equally many micro-batches, some of them empty: a
    sharded engine's collectives must meet. Pure, and the same on every rank.
    """
    by_length = sorted(range(len(numbers)), key=lambda i: (-lengths[i], numbers[i]))
    rows = _packed(by_length, lengths, limit.packed, replicas) if limit.packed else [[i] for i in by_length]
    filled = [sum(lengths[i] for i in row) for row in rows]
    share = max(1, -(-len(rows) // replicas))
    longest_first = sorted(range(len(rows)), key=lambda row: -filled[row])
    groups = _groups(longest_first, filled, MicroLimit(min(limit.rows, share), limit.tokens))
    rounds = max(1, -(-len(groups) // replicas))
    even = max(1, -(-len(rows) // (rounds * replicas)))  # as many rows in each, so that no replica waits for others
    evened = _groups(longest_first, filled, MicroLimit(min(limit.rows, even), limit.tokens))
    groups = evened if len(evened) <= rounds * replicas else groups
    placed: list[list[Placement]] = [[Placement() for _ in range(rounds)] for _ in range(replicas)]
    for i, group in enumerate(groups):
        turn, seat = divmod(i, replicas)
        replica = seat if turn % 2 == 0 else replicas - 1 - seat  # to and fro: the long ones do not all meet one rank
        placed[replica][turn] = Placement(tuple(tuple(numbers[j] for j in rows[row]) for row in group))
    return placed


def _packed(order: Sequence[int], lengths: Sequence[int], width: int, replicas: int) -> list[list[int]]:
    """Rows of several samples, as few as fit; then spread over what makes the replicas' shares equal.

    order: of falling length. A sample longer than `width` (one of many answers to a prompt, say) has a row of its own.
    """
    fewest = fitted(order, lengths, width)
    even = min(len(order), -(-len(fewest) // replicas) * replicas)
    spread = _spread(order, lengths, width, even)
    return spread if len(spread) <= even else fewest


def fitted(order: Sequence[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Each sample into the fullest row that has room for it (best-fit decreasing: at most 11/9 of the fewest rows)."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of each row: tokens left, its number; sorted
    for i in order:
        at = bisect_left(rooms, (lengths[i], -1))
        room, row = rooms.pop(at) if at < len(rooms) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    return rows


def _spread(order: Sequence[int], lengths: Sequence[int], width: int, count: int) -> list[list[int]]:
    """Each sample into the emptiest of `count` rows, or into one more where none has room: rows of like length."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]  # a heap
    for i in order:
        tokens, row = filled[0] if filled else (0, len(rows))
        if not filled or (tokens and tokens + lengths[i] > width):
            rows.append([i])
            heapq.heappush(filled, (lengths[i], len(rows) - 1))
        else:
            rows[row].append(i)
            heapq.heapreplace(filled, (tokens + lengths[i], row))
    return [row for row in rows if row]


def _groups(order: Sequence[int], lengths: Sequence[int], limit: MicroLimit) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in order:  # the first of a group is its longest: the others are padded to it
        room = groups and len(groups[-1]) < limit.rows
        if room and (not limit.tokens or (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= limit.tokens):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
