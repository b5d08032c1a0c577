"""What may stand in a record: text, conversations, labels, numbers; and what is said where something else does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of the two speakers."""


class RecordError(Exception):
    """A record that cannot become a row, in words for the user. reason: fewer words, by which such are counted."""

    def __init__(self, what: str, reason: str = "not the value asked for") -> None:
        super().__init__(what)
        self.reason = reason


def text(value: Any, where: str) -> str:
    """Raises RecordError where it is none."""
    if not isinstance(value, str):
        raise RecordError(f"{where} is {kind(value)}, not text")
    return value


def spoken(value: Any, where: str) -> str | list[dict[str, Any]]:
    """Text, or a list of messages. Raises RecordError."""
    return conversation(value, where) if isinstance(value, list) else text(value, where)


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


def conversation(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read. Raises RecordError."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"{where} is {kind(value)}, not a list of messages")
    return [_turn(turn, f"{where} message {count}") for count, turn in enumerate(value, start=1)]


def apart(chosen: Any, rejected: Any) -> dict[str, Any]:
    """A prompt, which is what two conversations begin with, and what of each comes after. Raises RecordError."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise RecordError(
            "has no prompt: 'chosen' and 'rejected' are not both conversations, which would begin with it"
        )
    pairs = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(chosen[:-1], rejected[:-1], strict=False))
    if not (prompt := [turn for turn, _ in pairs]):
        raise RecordError("has no prompt: 'chosen' and 'rejected' do not begin with the same message")
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """One message; ShareGPT's `from` and `value` are translated."""
    if not isinstance(turn, Mapping):
        raise RecordError(f"{where} is {kind(turn)}, not an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker, content = message.pop("from"), message.pop("value", None)
        message |= {"role": _ROLES.get(speaker, speaker), "content": content}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str) and not (key == "content" and "tool_calls" in message):
            raise RecordError(f"{where} has {kind(message.get(key))} as its {key}, not text")
    return message


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
