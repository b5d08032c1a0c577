"""What was typed behind `loomtune train -m`: Hydra's own keys, and the overrides of the items."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException

from loomtune.catalogue import installed
from loomtune.errors import Fault, UserError

_KNOWN = re.compile(r"hydra(\.sweep\.dir=|\.sweeper[.=]|\.launcher\.|/sweeper[/=])")
"""Keys of Hydra's that mean something here; any other would be without effect."""

_CALLS = re.compile(r"_target_|_partial_|custom_search_space")


@dataclass(frozen=True, slots=True)
class Request:
    """A sweep as it was typed. hydra: words for Hydra itself. words: overrides of the items, some of several values."""

    hydra: tuple[str, ...]
    words: tuple[str, ...]
    config_dirs: tuple[str, ...] = ()

    @classmethod
    def read(cls, typed: Sequence[str], config_dirs: Sequence[str] = ()) -> Request:
        """Raises UserError of every word that cannot be meant."""
        hydra = tuple(word for word in typed if _plain(word).startswith(("hydra.", "hydra/")))
        words = tuple(word for word in typed if word not in hydra)
        if faults := [*_foreign(hydra), *_unread(words)] or [*_twice(words)]:
            raise UserError(*faults)
        return cls(hydra, words, tuple(config_dirs))

    def set_by_hand(self, key: str) -> bool:
        """Whether a key of Hydra's was typed."""
        return any(_plain(word).partition("=")[0] == key for word in self.hydra)


def first(words: Iterable[str]) -> list[str]:
    """The overrides of one item that stands for all: of several values the first, of an interval its start."""
    return [f"{override.get_key_element()}={_first(override)}" for override in parsed(spread(words))]


def parsed(words: Iterable[str]) -> list[Override]:
    """The words as Hydra reads them."""
    found: list[Override] = OverridesParser.create().parse_overrides(list(words))
    return found


def spread(words: Iterable[str]) -> list[str]:
    """The words with a list of names for each glob: not every sweeper knows those. Raises UserError of an empty one."""
    return [_named(one) if isinstance(one.value(), Glob) else str(one.input_line) for one in parsed(words)]


def fixed(words: Iterable[str]) -> frozenset[str]:
    """Keys that have one value in all items."""
    return frozenset(override.key_or_group for override in parsed(words) if not override.is_sweep_override())


def label(overrides: Sequence[str], same: Collection[str]) -> str:
    """What sets an item apart from the others, in a line for people."""
    apart = [text for text in overrides if _plain(text).partition("=")[0] not in same] or overrides
    return " ".join(text if text.isprintable() else repr(text) for text in apart)


def _named(override: Override) -> str:
    glob: Any = override.value()
    there = installed().names(override.key_or_group)
    if names := glob.filter(there):
        return f"{override.get_key_element()}={','.join(names)}"
    cure = f"what can be chosen: {', '.join(there)}" if there else "only an axis, such as adapter, has names to choose"
    raise UserError.of(f"'{override.input_line}' matches nothing", cure)


def _first(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.get_value_element_as_str())
    value = override.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())


def _plain(word: str) -> str:
    return word.lstrip("+~")


def _foreign(hydra: Iterable[str]) -> Iterator[Fault]:
    for word in hydra:
        if not _KNOWN.match(_plain(word)):
            cure = "set hydra.sweep.dir, hydra/sweeper, hydra.sweeper.<setting> or hydra.launcher.<setting>"
            yield Fault(f"'{word}' would be without effect on a sweep", cure)
        elif _CALLS.search(word):
            yield Fault(f"'{word}' names code to call, which settings may not", "choose hydra/sweeper=<name>")


def _unread(words: Iterable[str]) -> Iterator[Fault]:
    for word in words:
        try:
            (override,) = parsed([word])
        except HydraException:
            cure = "quote the value, for the shell and for the reader: 'key=\"value\"'"
            yield Fault(f"'{word}' cannot be read", cure)
            continue
        if override.key_or_group == "run.dir":
            yield Fault(f"'{word}' would be the folder of every item", "set hydra.sweep.dir, in which each has its own")
        elif override.is_delete():
            yield Fault(f"'{word}' takes a key away", f"set {override.key_or_group}=null where nothing is wanted")


def _twice(words: Iterable[str]) -> Iterator[Fault]:
    """A sweeper would take the last of them without a word."""
    for key, count in Counter(override.key_or_group for override in parsed(words)).items():
        if count > 1:
            yield Fault(f"{key} is set {count} times", f"leave one, with all values: {key}=a,b")
