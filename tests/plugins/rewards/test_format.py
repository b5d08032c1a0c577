"""An answer looks as it should, or does not; how long that takes to see is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.rewards.format import Format, Look
from loomtune_plugins.rewards.settings import FormatSettings

THOUGHT = r"(?s)<think>(?P<thought>.*)</think>\s*(?P<answer>.*)"


def look(**settings: Any) -> Look:
    given = asdict(FormatSettings(**settings))
    return Look(**{key: given[key] for key in given if key not in ("weight", "seconds")})


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>well</think>\n3", 1.0),
        ("  <think>well\nthen</think> 3\n", 1.0),
        ("<think> </think> 3", 0.0),
        ("<think>well</think>", 0.0),
        ("so <think>well</think> 3", 0.0),
        ("3", 0.0),
    ],
)
def test_the_whole_answer_matches_and_named_parts_are_not_empty(text: str, score: float) -> None:
    assert look(pattern=THOUGHT)(text) == score


def test_a_part_is_enough_where_settings_say_so() -> None:
    assert look(pattern=r"\d+", whole=False)("it is 3") == 1.0
    assert look(pattern=r"\d+", wrong=-1.0)("it is 3") == -1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": 1, "b": [2]}', 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('{"b": 1}', 0.0),
        ("[1]", 0.0),
        ("{a: 1}", 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_is_read(text: str, score: float) -> None:
    assert look(keys=["a"])(text) == score
    assert look(json=True)(text) == (1.0 if text in ("[1]", '{"b": 1}') else score)


def test_a_pattern_that_never_ends_costs_its_answers_and_no_more(
    run: Any, answered: Callable[..., list[Answer]]
) -> None:
    reward = Format(FormatSettings(pattern=r"(\w+\s?)+!", seconds=2.0))
    scores = reward.score(run, answered(["yes!", "a" * 60, "no!"]))
    reward.pool.close()
    assert scores[0] == scores[2] == 1.0 and math.isnan(scores[1]) and "too long" in run.told[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "does not say"),
        ({"pattern": "("}, "no regular expression"),
        ({"json": True, "whole": False}, "there is none"),
        ({"json": True, "seconds": 0.0}, "is no time"),
    ],
)
def test_what_says_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Format(FormatSettings(**settings))
