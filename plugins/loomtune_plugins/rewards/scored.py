"""Scores that may fail, one by one: what a failure becomes, and what the user hears of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomtune.contracts import Answer, Reward
from loomtune.errors import UserError

if TYPE_CHECKING:
    from loomtune.run import Run

PATIENCE = 32
"""Answers in a row without a score, after which nothing is learned any more and the run ends."""


TOO_LONG = "it takes too long"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer has no score. kind: in a few words, the same for all such; said: about this one."""

    kind: str
    said: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.said}" if self.said else self.kind


Scored = float | Failure


class Scores(Reward):
    """A reward of which each rank scores a share, where an answer may fail.

    A failure is a NaN and is told once a kind. Where none of the first answers has a score, or none of many in a row,
    the run ends: it would train on nothing.
    """

    name = ""
    _told: frozenset[str] = frozenset()
    _lost: int = PATIENCE  # until one succeeds

    @abstractmethod
    def found(self, run: Run, answers: Sequence[Answer]) -> Sequence[Scored]:
        """A score for each of this rank's answers, or why it has none."""

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        """What all ranks made of their shares."""
        scores: list[Scored] = [0.0] * len(answers)
        world = run.world
        for rank, part in enumerate(world.gather(list(self.found(run, answers[world.rank :: world.size])))):
            scores[rank :: world.size] = part
        run.heed("asked to leave while answers are scored, which are generated anew")
        failures = [one for one in scores if isinstance(one, Failure)]
        self._tell(run, failures, len(scores))
        return [float("nan") if isinstance(one, Failure) else one for one in scores]

    def _tell(self, run: Run, failures: Sequence[Failure], of: int) -> None:
        """Says each kind of failure once. Raises UserError where there is nothing else, on every rank."""
        for one in failures:
            if one.kind not in self._told:
                self._told |= {one.kind}
                run.tell_once(f"reward={self.name} has no score for some answers, which are left out: {one}")
        self._lost = self._lost + len(failures) if len(failures) == of else 0
        if failures and self._lost >= PATIENCE:
            what = f"reward={self.name} has no score for any of {of} answers: {failures[0]}"
            raise UserError.of(
                what, "mend the reward, or what answers it, and resume: what was learned until here is kept"
            )
