"""Variants of loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Loss(ABC):
    """A variant for the objectives that take one: from log-probability sums to a loss for each row."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The terms that it adds to the objective."""

    @abstractmethod
    def weights(self, columns: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Weight of each term in a micro-batch (pairs, target tokens). Pure: reads no model."""

    @abstractmethod
    def terms(self, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Term name to `(rows,)` losses. columns: named by the objective that takes the loss."""
