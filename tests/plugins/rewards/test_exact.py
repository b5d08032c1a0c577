"""The final answer is found and compared as people would."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.rewards.exact import Comparison, Exact, number
from loomtune_plugins.rewards.settings import ExactSettings


def comparison(**settings: Any) -> Comparison:
    given = asdict(ExactSettings(**settings))
    return Comparison(**{key: given[key] for key in given if key not in ("weight", "reference", "seconds")})


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("so\n#### 72", "it is\n#### 72", 1.0),
        ("#### 72.00", "72", 1.0),
        ("#### $1,072", "#### 1072", 1.0),
        ("#### 71\nno:\n#### 72", "#### 72", 1.0),
        ("#### 72 apples.", "#### 72", 1.0),
        ("They have 12 and then 72.", "#### 72", 1.0),
        ("72 of 80", "#### 72", 0.0),
        ("#### -3", "#### 3", 0.0),
        ("it went from 5-3", "#### 3", 1.0),
        ("it fell by x = -3", "#### -3", 1.0),
        ("#### .5", "#### 0.5", 1.0),
        ("#### 1e3", "#### 1000", 1.0),
        ("#### Blue!", "#### blue", 1.0),
        ("#### 1 and 2", "#### 1", 0.0),
        ("no idea", "#### 3", -1.0),
        ("", "#### 3", -1.0),
    ],
)
def test_answers_are_compared_by_what_they_come_to(text: str, right: str, score: float) -> None:
    assert comparison(missing=-1.0)(text, right) == score


def test_the_last_number_counts_only_where_it_may() -> None:
    assert comparison()("it is 3", "#### 3") == 1.0
    assert comparison(last=False, missing=-0.5, wrong=-1)("it is 3", "#### 3") == -0.5


def test_numbers_may_be_words_and_may_differ_a_little() -> None:
    assert comparison()("#### 3.0", "#### 3") == 1.0 and comparison(numeric=False)("#### 3.0", "#### 3") == 0.0
    assert comparison()("#### 0.3333", "#### 0.33333") == 0.0
    assert comparison(tolerance=1e-3)("#### 0.3333", "#### 0.33333") == 1.0


def test_another_pattern_says_where_an_answer_stands() -> None:
    boxed = comparison(pattern=r"\\boxed\{([^{}]*)\}")
    assert boxed(r"so \boxed{3} or rather \boxed{4}", r"\boxed{4}") == 1.0
    assert boxed(r"so \boxed{3}", "4") == 0.0


def test_what_is_a_number() -> None:
    assert [number(text) for text in ("$1,000.50", "12 %", "-7")] == [1000.5, 12.0, -7.0]
    assert [number(text) for text in ("3/4", "", "x")] == [None] * 3


def test_a_pattern_that_never_ends_costs_its_answers_and_no_more(
    run: Any, answered: Callable[..., list[Answer]]
) -> None:
    exact = Exact(ExactSettings(pattern=r"(a+)+$", seconds=2.0))
    scores = exact.score(run, answered(["aa", "a" * 40 + "b", "aa"], gold="aa"))
    exact.pool.close()
    assert scores[0] == scores[2] == 1.0 and math.isnan(scores[1]) and "too long" in run.told[0]


def test_the_right_answer_stands_where_settings_say(run: Any, answered: Callable[..., list[Answer]]) -> None:
    exact = Exact(ExactSettings(reference="solution", weight=2.0))
    scores = exact.score(run, answered(["3", "4"], solution=3, completion="4"))
    exact.pool.close()
    assert scores == [1.0, 0.0] and exact.weight == 2.0
    data: Any = SimpleNamespace(rows=lambda split: [{"prompt": "?", "answer": "3"}])
    with pytest.raises(UserError, match=r"reward\.exact\.reference to one of: prompt, answer"):
        exact.check(data)


def test_what_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(UserError, match=r"reward\.exact\.pattern"):
        Exact(ExactSettings(pattern="("))


@pytest.mark.parametrize(("key", "value"), [("seconds", 0.0), ("tolerance", -1.0), ("tolerance", float("nan"))])
def test_settings_by_which_no_answer_could_be_compared_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"reward\.exact\.{key}"):
        Exact(ExactSettings(**{key: value}))


def test_every_solution_of_gsm8k_is_right_and_those_of_other_questions_are_not() -> None:
    shared = Path(os.environ.get("LOOMTUNE_SHARED") or Path(__file__).parents[4] / "shared")
    path = shared / "data" / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    compare = comparison()
    assert all(compare(solution, solution) == 1.0 for solution in solutions)
    finals = [solution.rpartition("####")[2].strip() for solution in solutions]
    said = [f"The answer is {final}." for final in finals]
    assert all(compare(one, solution) == 1.0 for one, solution in zip(said, solutions, strict=True))
    numbers = [float(final.replace(",", "")) for final in finals]
    same = [one == other for one, other in pairwise(numbers)]
    assert [compare(one, other) == 1.0 for one, other in pairwise(solutions)] == same and sum(same) < len(same) / 20
