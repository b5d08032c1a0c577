"""Scores of completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loomtune.contracts.data import Row

if TYPE_CHECKING:
    from loomtune.run import Run


class Reward(ABC):
    """Scores completions for reinforcement learning."""

    @abstractmethod
    def score(self, run: Run, rows: Sequence[Row], completions: Sequence[str]) -> list[float]:
        """One score for each completion of this rank; NaN where it could not be had in time, which leaves it out.

        run: has the roles and the tokenizer. Every rank calls it, with no rows where it has none.
        """
