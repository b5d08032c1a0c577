"""What is alike stays in one split, and the shares add up."""

from __future__ import annotations

from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.stages.settings import SplitSettings
from loomtune_plugins.stages.split import Split

LOOM = "A loom is a device on which cloth is woven: it holds the warp threads under tension. What does it hold?"
REED = "The reed keeps the warp threads apart and pushes each weft thread against the cloth. What does it do?"


def together(one: dict[str, Any], other: dict[str, Any], **settings: Any) -> bool:
    stage = Split(SplitSettings(**settings))
    first, second = stage.describe([one]), stage.describe([other])
    alike = bool((stage.alike(first, second) >= stage.threshold)[0])
    met = bool((stage.keys(first) == stage.keys(second)).any())
    assert met or not alike, "what is alike has a key in common"
    return alike


def test_one_prompt_with_several_answers_is_in_one_split() -> None:
    one, other = {"prompt": LOOM, "completion": "The warp."}, {"prompt": LOOM, "chosen": "A", "rejected": "B"}
    assert together(one, other) and together(one, other, similar=0)
    assert together(one, {"prompt": LOOM.upper(), "completion": "No."}, similar=0), "capitals and blanks do not count"


def test_prompts_that_are_nearly_the_same_are_in_one_split() -> None:
    other = {"prompt": LOOM.replace("device", "frame"), "completion": "x"}
    assert together({"prompt": LOOM}, other)
    assert not together({"prompt": LOOM}, other, similar=0)
    assert not together({"prompt": LOOM}, {"prompt": REED})


def test_rows_without_a_prompt_go_by_their_text() -> None:
    assert together({"text": LOOM}, {"text": LOOM + " "}) and not together({"text": LOOM}, {"text": REED})


def test_rows_of_one_group_are_in_one_split_whatever_they_ask() -> None:
    one, other = {"prompt": LOOM, "document": 7}, {"prompt": REED, "document": 7}
    assert together(one, other, group="document")
    assert not together(one, {**other, "document": 8}, group="document")
    assert together(one, {**one, "document": 8}, group="document"), "nor is one prompt in two groups parted"


def test_rows_whose_group_is_unknown_are_by_themselves() -> None:
    one, other = {"prompt": LOOM, "document": None}, {"prompt": REED, "document": None}
    assert not together(one, other, group="document")


def test_a_column_that_a_row_lacks_is_named_with_those_that_it_has() -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:3 has no column document; it has origin, prompt") as refused:
        Split(SplitSettings(group="document")).describe([{"prompt": LOOM, "origin": "rows.jsonl:3"}])
    assert "stage.split.group" in refused.value.faults[0].cure


def test_what_is_not_held_out_is_trained_on() -> None:
    assert Split(SplitSettings(validation=0.1, test=0.2)).shares() == pytest.approx(
        {"train": 0.7, "validation": 0.1, "test": 0.2}
    )
    assert Split(SplitSettings(validation=0, test=0)).shares() == {"train": 1}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"validation": 0.5, "test": 0.5}, "less than 1"),
        ({"validation": -0.1}, "stage.split.validation"),
        ({"test": 1.0}, "stage.split.test"),
        ({"similar": 0.3}, "stage.split.similar"),
        ({"hashes": 0}, "stage.split.hashes"),
        ({"hashes": 64, "similar": 0}, "stage.split.hashes"),
        ({"validation": 0, "test": 0, "group": "document"}, "stage.split.validation"),
    ],
)
def test_shares_and_settings_without_sense_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as refused:
        Split(SplitSettings(**settings))
    assert key in refused.value.faults[0].cure
