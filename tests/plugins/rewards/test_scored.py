"""An answer without a score is left out and told once a kind; a reward that scores nothing ends the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import Preempted, UserError
from loomtune_plugins.rewards.scored import PATIENCE, Failure, Scored, Scores


class Lengths(Scores):
    """The length of the text; none for one that says why."""

    name = "lengths"

    def found(self, run: Any, answers: Sequence[Answer]) -> Sequence[Scored]:
        return [
            Failure(*answer.text[1:].split("|")) if answer.text.startswith("!") else float(len(answer.text))
            for answer in answers
        ]


def test_a_failure_is_nan_and_is_told_once_a_kind(run: Any, answered: Callable[..., list[Answer]]) -> None:
    reward = Lengths()
    scores = reward.score(run, answered(["ab", "!Slow|9 s", "!Slow|8 s", "!Wrong|", "abcd"]))
    assert [str(score) for score in scores] == ["2.0", "nan", "nan", "nan", "4.0"]
    assert len(run.told) == 2
    assert "reward=lengths" in run.told[0] and "Slow: 9 s" in run.told[0] and run.told[1].endswith("Wrong")
    reward.score(run, answered(["a", "!Slow|7 s"]))
    assert len(run.told) == 2


def test_a_reward_that_never_scored_anything_ends_the_run_at_once(
    run: Any, answered: Callable[..., list[Answer]]
) -> None:
    with pytest.raises(UserError, match=r"reward=lengths has no score for any of 2 answers: KeyError: 'depth'"):
        Lengths().score(run, answered(["!KeyError|'depth'", "!Other|x"]))


def test_one_that_scored_before_may_fail_for_a_while(run: Any, answered: Callable[..., list[Answer]]) -> None:
    reward = Lengths()
    bad = answered(["!Slow|9 s"] * (PATIENCE - 1))
    reward.score(run, answered(["a"]))
    assert all(map(math.isnan, reward.score(run, bad)))
    reward.score(run, answered(["a"]))
    assert all(map(math.isnan, reward.score(run, bad)))
    with pytest.raises(UserError):
        reward.score(run, bad[:1])


def test_nothing_to_score_is_no_failure(run: Any) -> None:
    assert Lengths().score(run, []) == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_scores_a_share_and_all_have_the_whole(
    run: Any, answered: Callable[..., list[Answer]], size: int
) -> None:
    answers = answered(["a", "bb", "!Slow|9 s", "dddd", "eeeee"])
    shares = [list(Lengths().found(run, answers[rank::size])) for rank in range(size)]
    asked = []

    def gather(thing: list[Scored]) -> list[list[Scored]]:
        asked.append(thing)
        return shares

    for rank in range(size):
        run.world = SimpleNamespace(rank=rank, size=size, gather=gather)
        assert [str(score) for score in Lengths().score(run, answers)] == ["1.0", "2.0", "nan", "4.0", "5.0"]
    assert asked == shares


def test_a_rank_that_is_asked_to_leave_scores_nothing_wrong(run: Any, answered: Callable[..., list[Answer]]) -> None:
    run.stop.requested = True
    with pytest.raises(Preempted):
        Lengths().score(run, answered(["!the run is asked to leave|"]))
    assert not run.told
