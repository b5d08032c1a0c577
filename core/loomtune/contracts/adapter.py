"""Which parameters are trained, and what is added to the model for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from loomtune.contracts.model import WeightSource


class Adapter(ABC):
    """Changes a skeleton before it has weights, and knows how what it added is saved, switched off and merged."""

    @abstractmethod
    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """Adds to a module, which may be on the meta device, and marks by `requires_grad` what is trained.

        Returns the module to use and a source that knows every name of it: the base's tensors under the names that they
        have now, and initial values of what was added, drawn from (seed, name) and so equal on every world size.
        Raises UserError where a target matches nothing.
        """

    @abstractmethod
    def base(self, module: nn.Module) -> nn.Module:
        """The module as the model's plugin made it, whatever it is wrapped in now."""

    @abstractmethod
    def off(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within it the module computes as the base does."""

    @abstractmethod
    def base_name(self, name: str) -> str | None:
        """The base's name of a parameter, or None for what the adapter added."""

    @abstractmethod
    def learning_rate_scale(self, name: str) -> float:
        """Factor of the learning rate for a trained parameter (LoRA+); 1 for most."""

    @abstractmethod
    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """From all tensors of the woven module, in any order, the base's tensors with the adapter merged in."""

    @abstractmethod
    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Writes what was added, as others read it (peft's format). base: path or id of the base. `full`: nothing."""

    @property
    @abstractmethod
    def saves_base(self) -> bool:
        """True where training changes the base itself, so that a checkpoint must hold all of it (`full`)."""
