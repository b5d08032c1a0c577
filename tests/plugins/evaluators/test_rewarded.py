"""The chosen rewards score answers to held-out prompts, whatever the objective is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Answer, Reward, Row, Sampling
from loomtune.errors import Preempted, UserError
from loomtune.run import Run
from loomtune.settings import Settings
from loomtune.signals import StopRequest
from loomtune_plugins.evaluators.rewarded import Rewarded
from loomtune_plugins.evaluators.settings import RewardedSettings

EOS = 3


class Scores(Reward):
    """What a table says of a text; NaN where it says nothing."""

    def __init__(self, weight: float, **table: float) -> None:
        self.weight, self.table = weight, table
        self.answers: list[Answer] = []

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        self.answers += answers
        return [self.table.get(answer.text, math.nan) for answer in answers]


def letters(text: str) -> list[int]:
    return list(map(ord, text))


def a_run(rewards: dict[str, Reward], completions: dict[str, str], **more: Any) -> Any:
    rows: list[Row] = [{"prompt": prompt} for prompt in completions]
    asked: list[tuple[list[list[int]], Sampling]] = []

    def prompt(row: Row, tokenizer: Any) -> list[int]:
        if row["prompt"] == "none":
            raise ValueError("has no prompt")
        return letters(row["prompt"])

    def generate(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        asked.append((prompts, sampling))
        said = [completions["".join(map(chr, prompt))] for prompt in prompts]
        return [letters(text.rstrip("|")) + [EOS] * text.endswith("|") for text in said]

    usual: dict[str, Any] = {
        "rows": lambda split, limit: rows[:limit] if limit else rows,
        "generate": generate,
        "asked": asked,
        "rewards": rewards,
        "objective": SimpleNamespace(prompt=prompt),
        "tokenizer": SimpleNamespace(stops=(EOS,), decode=lambda tokens: "".join(map(chr, tokens))),
        "model": SimpleNamespace(context=lambda: 100),
        "data": SimpleNamespace(splits=lambda: ("train", "validation")),
        "world": SimpleNamespace(replicas=1, total=list),
        "settings": Settings(),
        "stop": StopRequest(),
        "guards": [],
    }
    made = SimpleNamespace(**usual | more)
    made.heed = partial(Run.heed, made)
    return made


def rewarded(**settings: Any) -> Rewarded:
    return Rewarded(RewardedSettings(**settings))


def test_each_reward_and_their_weighted_sum_are_means_over_answers() -> None:
    rewards: dict[str, Reward] = {"good": Scores(2.0, ab=1.0, c=0.0), "short": Scores(0.5, ab=-2.0, c=-1.0)}
    run = a_run(rewards, {"p": "ab|", "q": "c"})
    found = rewarded().evaluate(run)
    assert found == {
        "reward": pytest.approx((2.0 - 1.0 + 0.0 - 0.5) / 2),
        "reward/good": 0.5,
        "reward/short": -1.5,
        "reward_lost": 0.0,
        "reward_tokens": 2.0,
        "reward_ended": 0.5,
    }


def test_rewards_see_the_row_the_prompt_and_the_text_without_its_end() -> None:
    reward = Scores(1.0)
    rewarded().evaluate(a_run({"one": reward}, {"p": "ab|"}))
    (answer,) = reward.answers
    assert (answer.row, answer.prompt, answer.text, answer.ended) == ({"prompt": "p"}, [112], "ab", True)
    assert list(answer.tokens) == [*letters("ab"), EOS]


def test_an_answer_without_a_score_is_left_out_and_counted() -> None:
    rewards: dict[str, Reward] = {"one": Scores(1.0, a=1.0, b=3.0), "watched": Scores(0.0, a=5.0)}
    found = rewarded().evaluate(a_run(rewards, {"p": "a|", "q": "b|", "r": "c|"}))
    assert found["reward"] == 2.0 and found["reward_lost"] == pytest.approx(1 / 3)
    assert found["reward/one"] == 2.0 and found["reward/watched"] == 5.0


def test_nothing_that_has_a_score_has_no_mean() -> None:
    found = rewarded().evaluate(a_run({"one": Scores(1.0)}, {"p": "a|"}))
    assert math.isnan(found["reward"]) and found["reward_lost"] == 1.0


def test_prompts_that_cannot_be_asked_are_left_out() -> None:
    reward = Scores(1.0, a=1.0)
    run = a_run({"one": reward}, {"none": "a|", "p" * 100: "a|", "q": "a|"})
    assert rewarded().evaluate(run)["reward"] == 1.0 and len(reward.answers) == 1


def test_answers_are_drawn_as_settings_say() -> None:
    run = a_run({"one": Scores(1.0, a=1.0)}, {"p": "a|", "q": "a|", "r": "a|"})
    rewarded(rows=2, samples=3, temperature=0.7, top_k=5, top_p=0.9, max_tokens=7).evaluate(run)
    ((prompts, sampling),) = run.asked
    assert prompts == [letters("p")] * 3 + [letters("q")] * 3
    assert sampling == Sampling(max_tokens=7, temperature=0.7, top_k=5, top_p=0.9, stop=(EOS,))


def test_a_request_to_stop_is_heard() -> None:
    run = a_run({"one": Scores(1.0)}, {"p": "a|"})
    run.stop.asked = True
    with pytest.raises(Preempted):
        rewarded().evaluate(run)


@pytest.mark.parametrize(
    "settings", [{"samples": 0}, {"max_tokens": 0}, {"samples": 2}, {"temperature": -1.0}, {"split": "tests"}]
)
def test_settings_that_measure_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"evaluator\.reward"):
        rewarded(**settings).evaluate(a_run({}, {"p": "a|"}))
