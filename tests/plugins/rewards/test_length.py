"""Answers within bounds cost nothing, others more and more."""

from __future__ import annotations

from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.rewards.length import Length
from loomtune_plugins.rewards.settings import LengthSettings


def scores(run: Any, lengths: list[int], ended: bool = True, **settings: Any) -> list[float]:
    answers = [Answer({}, [], [7] * length, "", ended) for length in lengths]
    return Length(LengthSettings(**settings)).score(run, answers)


def test_the_overlong_punishment_is_that_of_dapo(run: Any) -> None:
    longest, cache = 20, 4

    def punishment(length: int) -> float:
        """Equation 13 as the paper has it."""
        if length <= longest - cache:
            return 0.0
        return ((longest - cache) - length) / cache if length <= longest else -1.0

    lengths = list(range(1, 30))
    found = scores(run, lengths, longest=longest - cache, margin=cache)
    assert found == pytest.approx([punishment(length) for length in lengths])


def test_short_answers_cost_too(run: Any) -> None:
    assert scores(run, [0, 6, 8, 10, 99], shortest=10, margin=4) == [-1.0, -1.0, -0.5, 0.0, 0.0]
    assert scores(run, [4, 5, 7, 8], shortest=5, longest=7) == [-1.0, 0.0, 0.0, -1.0]


def test_an_answer_that_was_cut_costs_at_least_so_much(run: Any) -> None:
    assert scores(run, [3, 12], ended=False, longest=10, margin=10, cut=0.5) == [-0.5, -0.5]
    assert scores(run, [30], ended=False, longest=10, margin=10, cut=0.5) == [-1.0]


@pytest.mark.parametrize(
    "settings", [{}, {"longest": 3, "shortest": 4}, {"longest": -1}, {"longest": 3, "margin": -1}, {"cut": -0.5}]
)
def test_bounds_that_no_answer_could_keep_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="length"):
        Length(LengthSettings(**settings))
