"""What is begun before it is needed: which prompts come next, by whom they are drawn, and what a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loomtune.contracts import Completion, Drawn, Sample, Segment
from loomtune.errors import Preempted, UserError
from loomtune_plugins.objectives.online.ahead import Next, Turn


def rows(first: int, count: int = 2) -> list[Drawn]:
    def one(visit: int) -> Drawn:
        tokens = np.array([1, 2, visit], np.int32)
        return Drawn(visit % 5, Sample((Segment(tokens, np.zeros(3, np.bool_)),)), {"gold": visit}, visit)

    return [one(visit) for visit in range(first, first + count)]


class Policy:
    """Completes a prompt by its visit and by how often it has learned."""

    def __init__(self) -> None:
        self.age = 0
        self.begun: list[int] = []

    def begin(self, drawn: Sequence[Drawn]) -> Callable[[], list[Completion]]:
        age = self.age
        self.begun.append(drawn[0].visit)
        return lambda: [Completion((one.visit, age), (-0.1, -1 / 3)) for one in drawn]


class Feed:
    """Draws rows, two at a time."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def draw(self) -> list[Drawn]:
        self.at += 2
        return rows(self.at - 2)


@pytest.fixture
def policy() -> Policy:
    return Policy()


def turn(kept: Next | None, feed: Feed, policy: Policy, *, last: bool = False) -> tuple[Any, Next | None, bool]:
    """One batch: its completions, what it leaves to the next, and whether it is of an older policy."""
    made = Turn(kept, feed.draw(), SimpleNamespace(draw=feed.draw), last=last)
    found = made.completed(made.drawn, policy.begin)
    return [tuple(one.tokens) for one in found], made.over(), made.older


def test_every_batch_but_the_first_is_drawn_by_the_policy_before_the_last_update(policy: Policy) -> None:
    feed, kept, seen = Feed(), None, []
    for _ in range(4):
        tokens, kept, older = turn(kept, feed, policy)
        seen.append((tokens, older))
        policy.age += 1
    assert [tokens[0] for tokens, _ in seen] == [(0, 0), (2, 0), (4, 1), (6, 2)]
    assert [older for _, older in seen] == [False, True, True, True]


def test_nothing_is_begun_that_is_not_trained_on(policy: Policy) -> None:
    feed = Feed()
    _, kept, _ = turn(None, feed, policy)
    _, kept, _ = turn(kept, feed, policy, last=True)
    assert policy.begun == [0, 2]
    assert kept is not None and not kept.begun and kept.drawn[0].visit == 4
    assert turn(kept, feed, policy)[0][0] == (4, 0), "where there is more to train on after all, no prompt is lost"


def test_a_run_of_one_batch_draws_no_other(policy: Policy) -> None:
    feed = Feed()
    _, kept, _ = turn(None, feed, policy, last=True)
    assert kept is None and feed.at == 2


def test_what_a_guard_went_back_behind_is_not_met_again(policy: Policy) -> None:
    feed = Feed()
    _, kept, _ = turn(None, feed, policy)
    feed.at = 20
    policy.age = 7
    tokens, after, older = turn(kept, feed, policy)
    assert tokens[0] == (20, 7) and not older
    assert after is not None and after.drawn[0].visit == 22 and after.follows == 24


def test_prompts_that_are_drawn_besides_come_before_those_that_follow(policy: Policy) -> None:
    feed = Feed()
    _, kept, _ = turn(None, feed, policy)
    made = Turn(kept, feed.draw(), SimpleNamespace(draw=feed.draw), last=False)
    made.completed(made.drawn, policy.begin)
    made.completed(feed.draw(), policy.begin)
    after = made.over()
    assert after is not None and after.drawn[0].visit == 4 and after.follows == 8
    assert turn(after, feed, policy)[0][0] == (4, 0)


def test_a_checkpoint_holds_it_to_the_bit(policy: Policy) -> None:
    feed = Feed()
    _, kept, _ = turn(None, feed, policy)
    assert kept is not None
    again = Next.parse(json.loads(json.dumps(kept.plain())))
    assert again.begun and again.follows == kept.follows
    assert [(one.visit, one.row, one.given) for one in again.drawn] == [(2, 2, {"gold": 2}), (3, 3, {"gold": 3})]
    assert [one.sample.segments[0].tokens.tolist() for one in again.drawn] == [[1, 2, 2], [1, 2, 3]]
    exact = [float(np.float32(value)) for value in (-0.1, -1 / 3)]
    assert [(tuple(one.tokens), list(one.log_probs)) for one in again.completed()] == [((2, 0), exact), ((3, 0), exact)]
    policy.age = 9
    assert turn(again, feed, policy)[0][0] == (2, 0), "it is not drawn anew"


def test_a_checkpoint_waits_though_ranks_are_asked_to_leave() -> None:
    polls = iter([False, False, True])

    def wait() -> list[Completion]:
        if not next(polls):
            raise Preempted("asked to leave")
        return [Completion((5,), (-1.0,))]

    kept = Next(rows(0, 1), 1, wait)
    with pytest.raises(Preempted):
        kept.completed()
    assert Next.parse(kept.plain()).completed() == [Completion([5], [-1.0])]


def test_an_engine_that_does_not_say_what_it_drew_with_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.ahead=1 needs the log-probabilities"):
        Turn.old({"reference": []})
