"""Giving freed memory back to the system, so that a rank's share stays a rank's share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from torch import Tensor

STRIDE = 64 << 20
"""Bytes that may be freed before they are given back: few beside a rank's share, many beside the cost of asking."""


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None under C libraries that have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Returns what was freed. glibc keeps it, in holes between what lives on, for tensors below 32 MB each."""
    if (trim := _trim()) is not None:
        trim(0)


class Passing:
    """Gives back what passes by: tensors that are copied elsewhere and freed, one after another."""

    def __init__(self) -> None:
        self._bytes = 0

    def count(self, tensor: Tensor) -> Tensor:
        """The tensor, once enough of those before it were given back."""
        self._bytes += tensor.nbytes
        if self._bytes > STRIDE:
            self._bytes = 0
            give_back()
        return tensor
