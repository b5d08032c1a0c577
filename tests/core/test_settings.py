"""The root settings."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import Any

import pytest
from omegaconf import OmegaConf

from loomtune.offers import AXES
from loomtune.settings import NOT_PART_OF_THE_MATHS, ROOT_KEYS, Settings, option, type_name


@dataclasses.dataclass
class Own:
    """Settings."""

    names: list[str] = option(["a"], "a list")
    each: dict[str, int] = option({}, "a mapping")
    count: int = option(3, "a number")


def test_a_default_that_can_change_is_each_one_s_own() -> None:
    one, other = Own(), Own()
    one.names.append("b")
    one.each["x"] = 1
    assert other.names == ["a"] and other.each == {}


def test_a_field_says_its_type_and_help() -> None:
    fields = {field.name: field for field in dataclasses.fields(Own)}
    assert {name: (type_name(field), field.metadata["help"]) for name, field in fields.items()} == {
        "names": ("list[str]", "a list"),
        "each": ("dict[str, int]", "a mapping"),
        "count": ("int", "a number"),
    }


def described(schema: Any, prefix: str = "") -> dict[str, str]:
    found = {}
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(value := getattr(schema, field.name)):
            found |= described(value, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = field.metadata.get("help", "")
    return found


def test_every_root_setting_is_explained_and_has_a_default() -> None:
    assert not [key for key, text in described(Settings()).items() if not text]
    assert OmegaConf.to_object(OmegaConf.structured(Settings)) == Settings()


def test_root_keys_and_axes_do_not_meet() -> None:
    assert not set(ROOT_KEYS) & {axis.name for axis in AXES}


@pytest.mark.parametrize("key", NOT_PART_OF_THE_MATHS)
def test_what_may_change_on_resume_exists(key: str) -> None:
    if key not in {axis.name for axis in AXES}:
        attrgetter(key)(Settings())
