"""What may stand in a record: text, labels, numbers; and what is said where something else does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Made = TypeVar("Made")


class RecordError(Exception):
    """A record that cannot become a row, in words for the user.

    reason: fewer words, by which such are counted. cure: what may help where all of a file's records are like that.
    """

    def __init__(self, what: str, reason: str = "not the value asked for", cure: str = "") -> None:
        super().__init__(what)
        self.reason, self.cure = reason, cure


def tried(make: Callable[..., Made], *given: Any) -> Made | RecordError:
    """What is made of a record, or what is wrong with it."""
    try:
        return make(*given)
    except RecordError as error:
        return error


def text(value: Any, where: str) -> str:
    """Raises RecordError where it is none."""
    if not isinstance(value, str):
        raise RecordError(f"{where} is {kind(value)}, not text")
    return value


def label(value: Any, where: str) -> bool:
    """Whether an answer is wanted. Raises RecordError."""
    if not is_label(value):
        raise RecordError(f"{where} is {kind(value)}, not true or false (or 1 or 0)")
    return bool(value)


def is_label(value: Any) -> bool:
    """True, false, 1 or 0."""
    return isinstance(value, bool | int) and value in (0, 1)


def number(value: Any, where: str) -> float:
    """A finite number. Raises RecordError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(f"{where} is {kind(value)}, not a number that can be compared")
    return float(value)


def listed(value: Any, where: str) -> Sequence[Any]:
    """Raises RecordError where it is no list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"{where} is {kind(value)}, not a list")
    return value


def keys(record: Mapping[str, Any]) -> str:
    """What a record has, in words."""
    shown = [f"{key:.80}" for key in itertools.islice(record, 20)]
    return ", ".join(shown + ["..."] * (len(record) > len(shown))) or "none"


_NAMES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: value is None, "nothing (null)"),
    (lambda value: isinstance(value, bool), "true or false"),
    (lambda value: isinstance(value, float) and not math.isfinite(value), "infinite, or no number at all (NaN)"),
    (lambda value: isinstance(value, int | float), "a number"),
    (lambda value: isinstance(value, str), "text"),
    (lambda value: isinstance(value, Mapping), "an object"),
    (lambda value: isinstance(value, Sequence), "a list"),
)


def kind(value: Any) -> str:
    """What a value is, in words."""
    return next((words for fits, words in _NAMES if fits(value)), type(value).__name__)
