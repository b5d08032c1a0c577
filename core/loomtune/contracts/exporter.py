"""Forms in which a trained model leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loomtune.contracts.model import Model


class Exporter(ABC):
    """Writes a model in a form that other programs serve."""

    @abstractmethod
    def export(self, model: Model, tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
        """Writes merged tensors, one at a time, with everything that a server needs beside them."""
