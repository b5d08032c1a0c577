"""Scores of completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from loomtune.contracts.data import Row
from loomtune.contracts.role import Role


class Reward(ABC):
    """Scores completions for reinforcement learning."""

    @abstractmethod
    def score(self, rows: Sequence[Row], completions: Sequence[str], roles: Mapping[str, Role]) -> list[float]:
        """One score for each completion; NaN where it could not be had in time, which leaves the sample out."""
