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
    def terms(self, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Term name to `(rows,)` losses. columns: named by the objective that takes the loss."""
