"""Judges of each step: the only observers that steer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loomtune.run import Run


class Verdict(IntEnum):
    """What to do with a step; where guards differ, the gravest holds."""

    CONTINUE = 0
    SKIP = 1
    ROLL_BACK = 2
    STOP = 3


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and, for the log and the error, its reason."""

    verdict: Verdict
    reason: str = ""


class Guard(ABC):
    """Judges steps by numbers that are equal on every rank, so that all ranks agree without asking."""

    def started(self, run: Run) -> None:
        """Called once on every rank before the first step."""
        return

    @abstractmethod
    def judge(self, step: int, loss: float, gradient_norm: float) -> Judgement:
        """Called after the backward passes, before the optimizer changes anything. loss: the global mean, all terms."""

    def waits(self) -> None:
        """Called on every rank, again and again, while no step comes: rows are still being read, or completions are
        made, scored, measured, a piece at a time. None hangs."""
        return

    def finished(self, run: Run) -> None:
        """Called once on every rank after the last step, also when the run failed."""
        return
