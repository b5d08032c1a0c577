"""A function of the user's scores answers, one by one or many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.rewards.function import Function
from loomtune_plugins.rewards.settings import FunctionSettings

Answered = Callable[..., list[Answer]]

MINE = """
from helping import known

def single(prompt, completion, row):
    assert prompt == row["prompt"]
    return known[completion] + row.get("extra", 0)

def many(prompts, completions, rows):
    if len(completions) > 3:
        raise ValueError("too many")
    return [known[one] + row.get("extra", 0) for one, row in zip(completions, rows)]

def array(prompts, completions, rows):
    import numpy
    return numpy.arange(len(prompts)) + len(prompts)

def few(prompts, completions, rows):
    return [1.0]

def broken(prompt, completion, row):
    raise LookupError("no such depth")
"""


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., Function]:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helping.py").write_text("known = {'a': 1.0, 'b': 2}\n")

    def made(name: str, **settings: Any) -> Function:
        return Function(FunctionSettings(function=f"{tmp_path}/mine.py:{name}", workers=1, **settings))

    return made


def test_it_is_called_with_the_prompt_the_completion_and_the_row(
    run: Any, answered: Answered, mine: Callable[..., Function]
) -> None:
    assert mine("single", weight=0.5).weight == 0.5
    assert mine("single").score(run, answered(["a", "b", "a"], extra=0.5)) == [1.5, 2.5, 1.5]


def test_it_may_be_called_with_many(run: Any, answered: Answered, mine: Callable[..., Function]) -> None:
    assert mine("many", batch=3).score(run, answered(["a", "b", "a", "b"])) == [1.0, 2.0, 1.0, 2.0]
    assert mine("array", batch=2).score(run, answered(["a", "b", "a"])) == [2.0, 3.0, 1.0]


def test_an_answer_that_fails_among_many_fails_alone(
    run: Any, answered: Answered, mine: Callable[..., Function]
) -> None:
    scores = mine("many", batch=3).score(run, answered(["a", "z", "b"]))
    assert scores[0] == 1.0 and math.isnan(scores[1]) and scores[2] == 2.0 and "KeyError: 'z'" in run.told[0]


def test_too_few_scores_are_not_given_to_the_wrong_answers(
    run: Any, answered: Answered, mine: Callable[..., Function]
) -> None:
    assert mine("few", batch=2).score(run, answered(["a", "b"])) == [1.0, 1.0], "each is asked about alone"


def test_one_that_always_fails_ends_the_run_with_its_own_words(
    run: Any, answered: Answered, mine: Callable[..., Function]
) -> None:
    with pytest.raises(UserError, match="LookupError: no such depth"):
        mine("broken").score(run, answered(["a", "b"]))


def test_it_is_had_before_the_run(tmp_path: Path, mine: Callable[..., Function]) -> None:
    nobody: Any = None
    mine("single").check(nobody)
    with pytest.raises(UserError, match="no attribute 'nothing'"):
        mine("nothing").check(nobody)
    (tmp_path / "helping.py").write_text("raise OSError('the disk is gone')")
    with pytest.raises(UserError, match="OSError at its beginning: the disk is gone"):
        mine("single").check(nobody)


@pytest.mark.parametrize("settings", [{}, {"function": "mine.py"}, {"function": "a:b", "seconds": 0.0}])
def test_settings_that_name_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"reward\.function"):
        Function(FunctionSettings(**settings))
