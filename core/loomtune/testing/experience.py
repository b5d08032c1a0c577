"""What an online objective makes of rows, by a toy policy that writes at random and a reward that counts letters."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from loomtune.contracts import (
    Answer,
    Completion,
    Drawn,
    Loss,
    Model,
    Objective,
    Reward,
    Role,
    Rollout,
    Row,
    Sample,
    Sampling,
)
from loomtune.contracts.model import Tokenizer
from loomtune.run import Run
from loomtune.testing import toy
from loomtune.world import World

LONGEST = 7
"""Tokens of a completion, at most."""


class Writing(Rollout):
    """Completions that depend on their key alone. sizes: tokens of those that were asked for."""

    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        """A few letters, ended where they are fewer than may be."""
        return [self._written(key, min(sampling.max_tokens, LONGEST), sampling.stop) for key in keys]

    def _written(self, key: int, most: int, stop: Sequence[int]) -> Completion:
        rng = random.Random(key)
        letters = [toy.SPECIAL + rng.randrange(97, 123) for _ in range(rng.randint(1, most))]
        return Completion(letters if len(letters) == most else [*letters, stop[0]])


class Letters(Reward):
    """The share of early letters."""

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        """The same on every rank."""
        return [sum(token < toy.SPECIAL + 110 for token in one.tokens) / LONGEST for one in answers]


def made(
    objective: Objective,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    model: Model,
    folder: Path = Path(),
    losses: Mapping[str, Loss] | None = None,
) -> Sequence[Sequence[Sample]]:
    """The steps of one batch, of toy roles. Hands the objective its losses, and its reward where it takes one.

    The reference is away from the policy, as after some steps: of two that are equal, rounding says which is ahead.
    """
    objective.use(losses or {}, {"letters": Letters()} if objective.takes_rewards() else {})
    run = toy.run(folder, {})
    run.model, run.tokenizer, run.objective, run.rollout = model, tokenizer, objective, Writing()
    run.roles, run.step = toy.roles(objective, model), 1
    if "reference" in run.roles:
        toy.move(run.roles["reference"])
    visits = enumerate(rows)
    samples = [(i, objective.sample(row, tokenizer, run.max_length), row) for i, row in visits]
    return objective.experience(run, [Drawn(i, sample, row, i) for i, sample, row in samples])


__all__ = ["Letters", "Writing", "made"]
