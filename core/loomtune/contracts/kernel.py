"""Attention back-ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from loomtune.contracts.batch import Batch


class Kernel(ABC):
    """Translates the segments of a batch into what a model's attention understands."""

    @abstractmethod
    def attention(self, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        """Arguments of the model's forward, so that a token sees exactly its own segment and that segment's ancestors.

        dtype: torch type of computation, for additive masks.
        """
