"""Rows are the same where all that is learned is, and only there."""

from __future__ import annotations

from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.stages.exact import Exact
from loomtune_plugins.stages.settings import ExactSettings

ROW = {"prompt": "Which?", "completion": "This one.", "label": True}


def same(one: dict[str, Any], other: dict[str, Any], **settings: Any) -> bool:
    stage = Exact(ExactSettings(**settings))
    first, second = stage.describe([one]), stage.describe([other])
    alike = bool(stage.alike(first, second)[0])
    assert alike == bool((stage.keys(first) == stage.keys(second)).all())
    return alike


def test_what_is_not_learned_does_not_count() -> None:
    assert same(ROW, {**ROW, "origin": "elsewhere:2", "difficulty": 3})


@pytest.mark.parametrize(
    "change",
    [{"label": False}, {"completion": "This one"}, {"prompt": "which?"}, {"tools": [{"name": "f"}]}, {"margin": 2.0}],
)
def test_anything_that_is_learned_counts(change: dict[str, Any]) -> None:
    assert not same(ROW, {**ROW, **change})


def test_columns_that_are_named_count_too() -> None:
    one, other = {**ROW, "gold": "4", "level": 1}, {**ROW, "gold": "5", "level": 2}
    assert same(one, other) and not same(one, other, columns=["gold"])
    assert same(one, {**other, "gold": "4"}, columns=["gold"])
    with pytest.raises(UserError, match="has no column gold") as refused:
        same(ROW, ROW, columns=["gold"])
    assert "stage.exact.columns" in refused.value.faults[0].cure


def test_roles_count() -> None:
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    turned = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    assert not same({"messages": turns}, {"messages": turned})


def test_blanks_and_capitals_count_unless_they_are_not_to() -> None:
    other = {**ROW, "completion": " this\n one. "}
    assert not same(ROW, other) and not same(ROW, other, blanks=False) and not same(ROW, other, case=False)
    assert same(ROW, other, blanks=False, case=False)


def test_half_a_character_is_described_too() -> None:
    assert not same(ROW, {**ROW, "completion": "\ud83d"})
