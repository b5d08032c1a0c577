"""Learning-rate schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Schedule(ABC):
    """A pure function of the optimizer step: it has no state, so there is nothing to save or to lose."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak rate in a step. step: from 1 to steps, the optimizer steps of the whole run."""
