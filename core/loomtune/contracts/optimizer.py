"""Optimizers, which say what state they keep, so that a checkpoint can be read under any layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class StateKind(StrEnum):
    """How a tensor of optimizer state relates to its parameter."""

    LIKE = "like"  # same shape: sharded and resharded as the parameter is
    SCALAR = "scalar"  # one number, such as the step
    OPAQUE = "opaque"  # readable only under the layout that wrote it


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters with the same weight decay and the same factor of the learning rate."""

    parameters: Sequence[nn.Parameter]
    decays: bool
    learning_rate_scale: float


class Optimizer(ABC):
    """Makes a torch optimizer from parameter groups."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The peak rate, which the schedule scales."""

    @property
    @abstractmethod
    def clip(self) -> float:
        """Largest global gradient norm; 0 for no clipping."""

    @abstractmethod
    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The optimizer, with one torch parameter group for each group given, in order."""

    @abstractmethod
    def state(self) -> Mapping[str, StateKind]:
        """What it keeps for each parameter, by torch's names (`exp_avg`, `exp_avg_sq`, `step`)."""
