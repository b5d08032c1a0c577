"""Deep models from shallow ones: what a step does grows evenly with the blocks, moment by moment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loomtune_plugins.planner.trace import Collective, Peak, Trace, Work

REPEATS = (3, 5, 8)
"""How often the blocks that repeat are built: twice to continue from, and once to see whether all grows evenly. With
fewer than three blocks there is none between the first and the last."""

TOLERANCE = 0.002
"""Relative difference of a moment's peak, of the third depth, from which on the whole model is traced."""


def depths(count: int, period: int) -> tuple[int, ...]:
    """At which depths a model of so many blocks is traced; nothing where it is no deeper than these.

    Each leaves over of the repeating blocks what the whole model leaves.
    """
    chosen = tuple(count % period + period * n for n in REPEATS) if period else ()
    return chosen if chosen and chosen[-1] < count else ()


def deep(trace: Callable[[int], Trace], count: int, period: int) -> Trace:
    """The trace of so many blocks, continued from shallow ones, or taken whole where these do not grow evenly.

    trace: of a model of so many blocks.
    """
    first, second, third = (trace(blocks) for blocks in depths(count, period))
    off = departure(continued(first, second, third.blocks), third)
    if off is None:
        made = continued(first, second, count)
        known = ", ".join(f"{one.blocks:g}" for one in (first, second, third))
        return replace(made, notes=(*made.notes, f"continued from {known} blocks"))
    whole = trace(count)
    return replace(whole, notes=(*whole.notes, f"all blocks were traced: {off}"))


def departure(foretold: Trace, seen: Trace) -> str | None:
    """Where a continued trace is not what was seen; None where it is."""
    for name in seen.moments.keys() | foretold.moments.keys():
        if name not in seen.moments or name not in foretold.moments:
            return f"there is no moment '{name}' at every depth"
        apart = abs(foretold.moments[name].bytes - seen.moments[name].bytes)
        if apart > TOLERANCE * max(seen.peak.bytes, 1):
            return f"memory does not grow evenly with blocks while '{name}'"
    for what in ("collectives", "work"):
        one, other = _bytes(getattr(foretold, what)), _bytes(getattr(seen, what))
        if abs(one - other) > TOLERANCE * max(other, 1):
            return f"{what} do not grow evenly with blocks"
    return None


def continued(one: Trace, other: Trace, blocks: float) -> Trace:
    """The trace of another depth, on the line through two."""
    at = (blocks - one.blocks) / (other.blocks - one.blocks)
    names = [name for name in other.moments if name in one.moments]
    moments = {name: _peak(one.moments[name], other.moments[name], at) for name in names}
    parameters = [round(_line(a, b, at)) for a, b in zip(one.parameters, other.parameters, strict=True)]
    return replace(
        other,
        blocks=float(blocks),
        moments=moments,
        kept=_causes(one.kept, other.kept, at),
        host=_causes(one.host, other.host, at),
        collectives=list(_sent(one.collectives, other.collectives, at)),
        work=list(_done(one.work, other.work, at)),
        parameters=(parameters[0], parameters[1], parameters[2]),
    )


def _line(one: float, other: float, at: float) -> float:
    return one + (other - one) * at


def _causes(one: Mapping[str, int], other: Mapping[str, int], at: float) -> dict[str, int]:
    both = {cause: round(_line(one.get(cause, 0), other.get(cause, 0), at)) for cause in {**one, **other}}
    return {cause: count for cause, count in both.items() if count}


def _peak(one: Peak, other: Peak, at: float) -> Peak:
    causes = _causes(one.causes, other.causes, at)
    return Peak(sum(causes.values()), causes)


def _sent(one: Iterable[Collective], other: Iterable[Collective], at: float) -> Iterator[Collective]:
    """Messages of sizes that both depths know are continued one by one, the others, whose size itself grows, as a sum.

    Buckets are such, and gradients that are sent together.
    """
    left, right = _counted(one), _counted(other)
    for message in right:
        if message in left:
            yield replace(message, count=_line(left[message], right[message], at))
    grown: dict[Collective, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0], [0.0, 0.0]])
    for side, (mine, others) in enumerate(((left, right), (right, left))):
        for message, count in mine.items():
            if message not in others:
                sums = grown[replace(message, bytes=0)][side]
                sums[0], sums[1] = sums[0] + count, sums[1] + count * message.bytes
    for message, (before, after) in grown.items():
        count, total = (_line(a, b, at) for a, b in zip(before, after, strict=True))
        if count > 0 and total > 0:
            yield replace(message, bytes=round(total / count), count=count)


def _counted(messages: Iterable[Collective]) -> dict[Collective, float]:
    counts: dict[Collective, float] = defaultdict(float)
    for message in messages:
        counts[replace(message, count=0)] += message.count
    return counts


def _done(one: Iterable[Work], other: Iterable[Work], at: float) -> Iterator[Work]:
    """By kind and shape; operations and bytes of equal ones are continued as sums, for those of an optimizer grow."""
    left, right = _summed(one), _summed(other)
    for kind in {**left, **right}:
        sums = [_line(a, b, at) for a, b in zip(left.get(kind, _NONE), right.get(kind, _NONE), strict=True)]
        count, flops, touched = sums
        if count > 0:
            yield replace(kind, count=count, flops=flops / count, bytes=touched / count)


_NONE = (0.0, 0.0, 0.0)


def _summed(operations: Iterable[Work]) -> dict[Work, Sequence[float]]:
    sums: dict[Work, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in operations:
        kind = replace(one, flops=0, bytes=0, count=0)
        for place, value in enumerate((1.0, one.flops, one.bytes)):
            sums[kind][place] += one.count * value
    return sums  # type: ignore[return-value]


def _bytes(things: Iterable[Any]) -> float:
    return float(sum(one.bytes * one.count for one in things))
