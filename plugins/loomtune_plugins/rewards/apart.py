"""Rewards that call in worker processes what might hang or crash."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Answer
from loomtune_plugins.rewards.scored import Scored, Scores
from loomtune_plugins.rewards.workers.pool import Pool

if TYPE_CHECKING:
    from loomtune.run import Run

MEMORY = 4 << 30
"""Bytes that a worker may take."""


class Apart(Scores):
    """Scores an answer by a call in a worker, with what the answer comes down to; equal calls are made once."""

    def __init__(self, weight: float, pool: Pool) -> None:
        self.weight = weight
        self.pool = pool

    @abstractmethod
    def arguments(self, answer: Answer) -> Hashable:
        """What the call is about: a tuple of plain data."""

    def found(self, run: Run, answers: Sequence[Answer]) -> Sequence[Scored]:
        asked = [self.arguments(answer) for answer in answers]
        calls: list[Any] = list(dict.fromkeys(asked))
        found = self.pool.call([(1, call) for call in calls], lambda: run.stop.requested)
        known = {call: scores[0] for call, scores in zip(calls, found, strict=True)}
        return [known[call] for call in asked]
