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
        """Writes everything that a server needs into an empty folder, which gets its name once this returns.

        tensors: fp32, whole and on the CPU, under the names that the model's skeleton has for them (tied ones once),
        with the adapter merged in; each is read when it is asked for, so what is let go of costs no memory.
        Scalar heads come as `heads.<name>.weight` `(1, width)`.
        """
