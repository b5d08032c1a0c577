"""Measurements of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts.data import Data

if TYPE_CHECKING:
    from loomtune.run import Run


class Evaluator(ABC):
    """Measures the policy. Called on every rank, under `evaluating()`; leaves no trace in training.

    scores: whether it has the chosen rewards score completions (`Run.rewards`), whatever the objective is.
    """

    scores: bool = False

    def check(self, data: Data) -> None:
        """Raises UserError where the data lack what is measured; before the run, without torch."""
        return

    def reads(self, splits: Sequence[str]) -> Sequence[str]:
        """The splits, of those there are, whose samples it computes on (`Run.batches`); as here: perhaps any."""
        return splits

    @abstractmethod
    def evaluate(self, run: Run) -> Mapping[str, float]:
        """Metrics, equal on every rank: sums are taken over ranks before any division.

        What takes long calls `run.heed()` between its pieces, on every rank equally often, so that a request to leave
        need not wait for the last of them.
        """
