"""What the user typed: choices of axes and values of keys, read once, with everything that cannot be meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from loomtune.catalogue import is_many
from loomtune.errors import Fault
from loomtune.offers import AXES

AXIS_NAMES = tuple(axis.name for axis in AXES)
GROUPS = (*AXIS_NAMES, "hardware", "recipe")
"""Keys that name a config: those of the axes, what is planned for, and whole runs."""


@dataclass(slots=True)
class Requests:
    """Overrides in the order typed, the default recipe first where it applies. faults: each with what it is about."""

    choices: list[Override] = field(default_factory=list)
    values: list[Override] = field(default_factory=list)
    faults: dict[Fault, str] = field(default_factory=dict)

    @classmethod
    def read(cls, texts: Sequence[str], default: str) -> Requests:
        """Reads all of them; what cannot be read is left out and is among the faults.

        default: the recipe of the data of that name, which runs where no data of one's own are named; empty: none.
        """
        requests = cls()
        for text in texts:
            try:
                override = OverridesParser.create().parse_override(text)
            except HydraException:
                requests.faults[_unread(text)] = subject(text)
                continue
            if fault := _refused(override, text):
                requests.faults[fault] = subject(override.key_or_group)
            else:
                (requests.choices if override.key_or_group in GROUPS else requests.values).append(override)
        requests.faults |= _contradictions([*requests.choices, *requests.values])
        requests.choices = [*_default_recipe(requests.chosen(), default), *requests.choices]
        return requests

    def chosen(self) -> dict[str, str]:
        """Group to what was typed for it."""
        return {override.key_or_group: override.get_value_string() for override in self.choices}


def text_of(override: Override, *, new: bool = False) -> str:
    """The override as Hydra takes it, empty where there is nothing to say to it.

    Whether a key exists is checked here, so nobody need write `+`; and a group is set to null in ways of its own.
    """
    key = override.key_or_group
    if key in GROUPS and override.value() is None:
        nothing = "" if key == "recipe" else f"~{key}"
        return f"{key}=[]" if is_many(key) else nothing
    return ("++" if new else "") + (override.input_line or "").lstrip("+")


def subject(text: str) -> str:
    """The axis that a key, perhaps a misspelt one, is about; its own first word where it is about none."""
    word = re.split(r"[.=@/]", text.lstrip("+~"), maxsplit=1)[0]
    return next(iter(get_close_matches(word, GROUPS, n=1)), word)


def names_choice(key: str) -> bool:
    """True for the `name` in an axis' settings, or in those of one of many choices: a group sets it, never a key."""
    axis, _, rest = key.partition(".")
    return axis in AXIS_NAMES and rest.rpartition(".")[2] == "name" and rest.count(".") == is_many(axis)


def quoted(text: str) -> str:
    """A text as an override's value must be written for it to arrive as it is."""
    return QuotedString(text, Quote.single).with_quotes()


def _unread(text: str) -> Fault:
    key, given, value = text.partition("=")
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    cure = f"quote the value, for the shell and for the reader: '{key}={quoted}'" if given else f"write {text}=<value>"
    return Fault(f"'{text}' cannot be read", cure)


def _refused(override: Override, text: str) -> Fault | None:
    key = override.key_or_group
    many = is_many(key)
    if override.is_delete():
        return Fault(f"'{text}' takes a key away", f"set {key}={'[]' if many else 'null'} where nothing is wanted")
    if override.is_sweep_override():
        cure = f"write {key}=[a,b] for several at once" if many else "start a run for each"
        return Fault(f"'{text}' asks for several runs", f"{cure}; text with a comma is quoted: '{key}=\"a,b\"'")
    if override.package is not None:
        return Fault(f"'{text}' moves a config to another place", f"write {key}=<name>")
    return None


def _contradictions(overrides: Sequence[Override]) -> Iterator[tuple[Fault, str]]:
    """Keys that are set to two values: one of them would be without effect."""
    first: dict[str, Override] = {}
    for override in overrides:
        key = override.key_or_group
        before = first.setdefault(key, override)
        if text_of(before) != text_of(override):
            what = f"'{before.input_line}' and '{override.input_line}' set the same key"
            yield Fault(what, "leave one of them out"), subject(key)


def _default_recipe(asked: Mapping[str, str], default: str) -> list[Override]:
    """The default recipe, unless another, or data of one's own, is asked for."""
    if not default or "recipe" in asked or asked.get("data", default) != default:
        return []
    return [OverridesParser.create().parse_override(f"recipe={default}")]
