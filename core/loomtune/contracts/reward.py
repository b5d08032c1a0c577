"""Scores of completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loomtune.contracts.data import Data, Row

if TYPE_CHECKING:
    from loomtune.contracts.objective import RoleSpec
    from loomtune.run import Run


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion that is to be scored.

    row: as the data's plugin gave it. prompt, tokens: ids; the stop token is the last of `tokens` where one came.
    text: of the tokens, without what ends an answer. ended: False where it was cut at its longest.
    """

    row: Row
    prompt: Sequence[int]
    tokens: Sequence[int]
    text: str
    ended: bool


class Reward(ABC):
    """Scores completions for reinforcement learning.

    weight: what its score is multiplied with in the sum over the chosen rewards.
    """

    weight: float = 1.0

    def roles(self) -> Mapping[str, RoleSpec]:
        """Frozen networks that it reads, which the objective adds to its own; none unless said otherwise."""
        return {}

    def check(self, data: Data) -> None:
        """Raises UserError where the data lack what it looks at; before the run, without torch."""
        return

    def fingerprint(self) -> str:
        """Digest of the files by which it scores, which no checkpoint holds; without torch. Empty, as here: none.

        What the roles' models read is told by these. Raises UserError where files are missing.
        """
        return ""

    @abstractmethod
    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        """One score for each answer; NaN where it could not be had, which leaves the answer out.

        answers: those of all ranks, the same list on every rank, and so are the scores. A failure or a time-out of one
        answer is its NaN, never an exception, and never a rank that others wait for.
        """
