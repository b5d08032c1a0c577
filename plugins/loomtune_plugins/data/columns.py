"""From a file's record to a row in the one schema that objectives read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune.errors import UserError, near
from loomtune_plugins.data.files_settings import FileSettings

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""Format to the keys of its rows, in the order in which `auto` tries them."""

KEYS = tuple(dict.fromkeys(key for keys in FORMATS.values() for key in keys))

LABEL = "label"
"""Says of an answer whether it is wanted. Other files use the word for classes: those columns ride along."""

_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of the two speakers."""


class RecordError(Exception):
    """A record that cannot become a row, in words for the user."""


@dataclass(frozen=True)
class Columns:
    """Which column fills which key. columns: key to column, for the keys of one format."""

    columns: Mapping[str, str]

    @classmethod
    def of(cls, settings: FileSettings, record: Mapping[str, Any], where: str) -> Columns:
        """The mapping that settings and a first record ask for. Raises UserError where a column is not there."""
        named = {key: getattr(settings, key) for key in KEYS if getattr(settings, key)}
        chosen = settings.format if settings.format != "auto" else _guess(named, record, where)
        unused = sorted(set(named) - set(FORMATS[chosen]))
        if unused:
            raise UserError.of(
                f"data.{unused[0]}={named[unused[0]]} is never used, because the rows are read as format={chosen}",
                f"leave data.{unused[0]} out, or set data.format to one of {', '.join(_with(unused[0]))}",
            )
        columns = {key: named.get(key, key) for key in FORMATS[chosen]}
        for key, column in columns.items():
            if column not in record:
                raise _missing(key, column, chosen, record, where)
        return cls(columns)

    def row(self, record: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """The row; other columns ride along. Raises RecordError."""
        row = {column: value for column, value in record.items() if column == LABEL or column not in KEYS}
        for key, column in self.columns.items():
            row[key] = self._value(record, key, column)
        row["origin"] = origin
        return row

    def _value(self, record: Mapping[str, Any], key: str, column: str) -> Any:
        if column not in record:
            raise RecordError(f"has no column '{column}'; it has {', '.join(record) or 'none'}")
        value = record[column]
        if key == LABEL:
            if not _is_label(value):
                raise RecordError(f"'{column}' is {_kind(value)}, not true or false (or 1 or 0)")
            return bool(value)
        if key == "messages" or ({"chosen", LABEL} & self.columns.keys() and isinstance(value, list)):
            return _conversation(value, column)
        if not isinstance(value, str):
            raise RecordError(f"'{column}' is {_kind(value)}, not text")
        return value


def learned(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says; what a hash of its content goes by. Both labels of one answer are the same content."""
    return {key: row[key] for key in KEYS if key in row and key != LABEL}


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int) and value in (0, 1)


def _guess(named: Mapping[str, str], record: Mapping[str, Any], where: str) -> str:
    """The first format that takes every named column and finds its others in the record."""
    takes = [name for name, keys in FORMATS.items() if set(named) <= set(keys)]
    if LABEL not in named and not _is_label(record.get(LABEL)):
        takes = [name for name in takes if LABEL not in FORMATS[name]]
    for name in takes:
        if all(named.get(key, key) in record for key in FORMATS[name]):
            return name
    if named and takes:
        return min(takes, key=lambda name: sum(named.get(key, key) not in record for key in FORMATS[name]))
    raise UserError.of(
        f"{where} has the columns {', '.join(record) or '(none)'}, of which no format can be made"
        + (f" with {' and '.join(f'data.{key}={column}' for key, column in named.items())}" if named else ""),
        "name the columns, for instance data.prompt=question data.completion=answer (or data.messages=, data.text=)",
    )


def _missing(key: str, column: str, chosen: str, record: Mapping[str, Any], where: str) -> UserError:
    return UserError.of(
        f"{where} has no column '{column}' for the {key} of format={chosen}; it has {', '.join(record) or 'none'}."
        f"{near(column, record)}",
        f"set data.{key}= to one of its columns",
    )


def _with(key: str) -> list[str]:
    return [name for name, keys in FORMATS.items() if key in keys]


def _conversation(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"'{column}' is {_kind(value)}, not a list of messages")
    return [_turn(turn, f"'{column}' message {number}") for number, turn in enumerate(value, start=1)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A message in the form that chat templates read; ShareGPT's `from` and `value` are translated."""
    if not isinstance(turn, Mapping):
        raise RecordError(f"{where} is {_kind(turn)}, not an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker, content = message.pop("from"), message.pop("value", None)
        message |= {"role": _ROLES.get(speaker, speaker), "content": content}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str) and not (key == "content" and "tool_calls" in message):
            raise RecordError(f"{where} has {_kind(message.get(key))} as its {key}, not text")
    return message


_NAMES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: value is None, "nothing (null)"),
    (lambda value: isinstance(value, bool), "true or false"),
    (lambda value: isinstance(value, int | float), "a number"),
    (lambda value: isinstance(value, str), "text"),
    (lambda value: isinstance(value, Mapping), "an object"),
    (lambda value: isinstance(value, Sequence), "a list"),
)


def _kind(value: Any) -> str:
    """What a value is, in words."""
    return next((words for fits, words in _NAMES if fits(value)), type(value).__name__)
