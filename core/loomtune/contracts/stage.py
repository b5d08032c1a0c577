"""Steps of data preparation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from loomtune.contracts.data import Row


class Stage(ABC):
    """Turns a stream of rows into another; a dropped row is yielded with its reason in `dropped`."""

    @abstractmethod
    def apply(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Rows in the order read, without holding them all."""
