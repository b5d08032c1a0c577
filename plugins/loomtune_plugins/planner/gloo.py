"""What gloo sends, message by message: torch's backend of CPUs, as torch 2.13 calls it.

Read in gloo's source at 70dc360 (`gloo/<operation>.cc`) and torch's `ProcessGroupGloo.cpp`, and counted between network
namespaces (`tests/labs/wire.py`). Unlike what its name promises, `reduce_scatter` is an all_reduce of a copy, of which
each rank keeps its part: twice the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

SEGMENT = 1 << 20
"""Bytes of a message of all_reduce and reduce at most (`kMaxSegmentSize`)."""

PREAMBLE = 48
"""Bytes before a message's own, and of the two that announce it, from either side (`tcp/pair.h`, `Op::preamble`)."""

Edge = tuple[int, int, float, float]
"""What one rank sends another, both as places in the group: (from, to, bytes, messages)."""


def edges(operation: str, size: int, item: int, group: int) -> Iterator[Edge]:
    """What a group of so many ranks sends. size: bytes of the whole tensor; item: bytes of a number.

    Raises AssertionError for an operation that is not known.
    """
    assert operation in _ALL, f"gloo does not know {operation}"
    if group > 1 and (size > 0 or operation == "barrier"):
        yield from _ALL[operation](size, item, group)


def rounds(operation: str, size: int, item: int, group: int) -> float:
    """Messages that have to follow one another, each after a greeting both ways."""
    if operation in {"all_reduce", "reduce_scatter", "reduce"}:
        return 2 * _per_rank(size, item, group)[0] * (group - 1)
    if operation == "all_gather":
        return 2 * (group - 1)
    return (group - 1).bit_length() if operation in {"broadcast", "barrier"} else 1


def _per_rank(size: int, item: int, group: int) -> tuple[int, int]:
    """Into how many segments each rank's chunk of a ring is cut, and the bytes of one: at least two, to overlap."""
    most = item * max(1, SEGMENT // item)
    segments = _up(max(-(-size // most), 2 * group), group)
    return segments // group, _up(-(-size // segments), item)


def _chunks(size: int, item: int, group: int) -> list[tuple[int, int]]:
    """(bytes, segments) of each rank's chunk: the last ones are what is left, or empty."""
    per_rank, segment = _per_rank(size, item, group)
    chunk = per_rank * segment
    left = [min(chunk, max(0, size - rank * chunk)) for rank in range(group)]
    return [(one, -(-one // segment)) for one in left]


def _all_reduce(size: int, item: int, group: int) -> Iterator[Edge]:
    """A ring towards the lower rank, twice: what is not mine is summed on its way, then goes round whole."""
    chunks = _chunks(size, item, group)
    messages = sum(one[1] for one in chunks)
    for rank in range(group):
        mine, before = chunks[rank], chunks[rank - 1]
        yield rank, (rank - 1) % group, 2 * size - mine[0] - before[0], 2 * messages - mine[1] - before[1]


def _reduce(size: int, item: int, group: int) -> Iterator[Edge]:
    """The ring's first half, all but the last two of a rank's own segments, then each chunk to the first rank."""
    segment = _up(min(-(-size // (2 * group)), SEGMENT // item * item), item)
    count = _up(max(-(-size // segment), 2 * group), group)
    lengths = [min(segment, max(0, size - i * segment)) for i in range(count)]
    mine = count // group
    for rank in range(group):
        kept = lengths[(rank + 1) * mine - 2 : (rank + 1) * mine]
        chunk = sum(lengths[rank * mine : (rank + 1) * mine])
        yield rank, (rank - 1) % group, size - sum(kept), sum(map(bool, lengths)) - sum(map(bool, kept))
        if rank and chunk:
            yield rank, 0, chunk, 1


def _all_gather(size: int, item: int, group: int) -> Iterator[Edge]:
    """A ring towards the higher rank; each part in two halves."""
    for rank in range(group):
        yield rank, (rank + 1) % group, (group - 1) * (size // group), 2 * (group - 1)


def _all_to_all(size: int, item: int, group: int) -> Iterator[Edge]:
    for rank in range(group):
        for other in range(group):
            if other != rank:
                yield rank, other, size / group, 1


def _broadcast(size: int, item: int, group: int) -> Iterator[Edge]:
    """A binomial tree from the first rank: who has it doubles with every round."""
    for distance in (1 << i for i in range((group - 1).bit_length())):
        for rank in range(min(distance, group - distance)):
            yield rank, rank + distance, size, 1


def _gather(size: int, item: int, group: int) -> Iterator[Edge]:
    for rank in range(1, group):
        yield rank, 0, size / group, 1


def _scatter(size: int, item: int, group: int) -> Iterator[Edge]:
    for rank in range(1, group):
        yield 0, rank, size / group, 1


def _barrier(size: int, item: int, group: int) -> Iterator[Edge]:
    """Empty messages to those 1, 2, 4, ... ranks on (Hensgen, Finkel and Manber 1988)."""
    for distance in (1 << i for i in range((group - 1).bit_length())):
        for rank in range(group):
            yield rank, (rank + distance) % group, 0, 1


def _send(size: int, item: int, group: int) -> Iterator[Edge]:
    yield 0, 1, size, 1


def _receive(size: int, item: int, group: int) -> Iterator[Edge]:
    yield 1, 0, size, 1


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_ALL = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _all_reduce,
    "reduce": _reduce,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": _barrier,
    "send": _send,
    "receive": _receive,
}
