"""A stretch of a flattened tensor as boxes of the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


class Box(NamedTuple):
    """offset, extent: where the box lies in the tensor, and its shape. begin: its first number in the flattened one."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        """How many numbers it holds; in the flattened tensor they follow one another."""
        return prod(self.extent)

    @property
    def region(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(at, at + size) for at, size in zip(self.offset, self.extent, strict=True))


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """Cuts `[begin, end)` of a flattened tensor into boxes, in order: at most three for a matrix, one for a vector."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield Box((begin,) * len(shape), (end - begin,) * len(shape), begin)
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row  # the rows that are there whole
    if first > last:  # begins and ends within one row
        yield from _inside(shape, last, begin, end)
        return
    yield from _inside(shape, first - 1, begin, first * row)
    if first < last:
        rest = tuple(shape[1:])
        yield Box((first, *(0 for _ in rest)), (last - first, *rest), first * row)
    yield from _inside(shape, last, last * row, end)


def _inside(shape: Sequence[int], row: int, begin: int, end: int) -> Iterator[Box]:
    """Boxes of a stretch that lies within one row."""
    base = row * prod(shape[1:])
    for box in boxes(shape[1:], begin - base, end - base):
        yield Box((row, *box.offset), (1, *box.extent), box.begin + base)


@dataclass(frozen=True, slots=True)
class Fragment:
    """The stretch `[begin, end)` of a flattened parameter that a rank holds, as a part of a flat tensor of many.

    shape: of the whole parameter. group: which flat tensor it lies in. at: where it begins there.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    begin: int
    end: int
    group: int
    at: int

    def cut(self, flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """Boxes of the parameter, and their values as views of a tensor that is laid out as the flat one is."""
        for box in boxes(self.shape, self.begin, self.end):
            yield box, flat.narrow(0, self.at + box.begin - self.begin, box.numel).view(box.extent)
