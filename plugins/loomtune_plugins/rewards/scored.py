"""Scores that may fail, one by one: what a failure becomes, and what the user hears of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomtune.contracts import Answer, Reward
from loomtune.errors import RunFailed

if TYPE_CHECKING:
    from loomtune.run import Run

PATIENCE = 32
"""Answers in a row without a score, after which nothing is learned any more and the run ends."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer has no score. kind: in a few words, the same for all such; said: about this one."""

    kind: str
    said: str


Scored = float | Failure


class Scores(Reward):
    """A reward of which each rank scores a share, where an answer may fail.

    A failure is a NaN and is told once a kind. Where none of the first answers has a score, or none of many in a row,
    the run fails: it would train on nothing.
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
        failures = [one for one in scores if isinstance(one, Failure)]
        self._tell(run, failures, len(scores))
        return [float("nan") if isinstance(one, Failure) else one for one in scores]

    def _tell(self, run: Run, failures: Sequence[Failure], of: int) -> None:
        """Says each kind of failure once. Raises RunFailed where there is nothing else."""
        kinds: Mapping[str, Failure] = {one.kind: one for one in reversed(failures)}
        for kind, first in kinds.items():
            if kind not in self._told:
                run.tell_once(
                    f"reward={self.name} gives no score where {kind}; such answers are left out: {first.said}"
                )
        self._told |= kinds.keys()
        self._lost = self._lost + len(failures) if len(failures) == of else 0
        if failures and self._lost >= PATIENCE:
            first = failures[0]
            raise RunFailed(f"reward={self.name} scored none of {of} answers: {first.kind}: {first.said}")
