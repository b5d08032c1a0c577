"""From the text of a record to its values, or to a few words about what is wrong with it."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date, time
from typing import Any

from loomtune_plugins.data.values import RecordError

DEPTH = 100
"""Of lists and objects in each other. What is deeper is no data, and makes one of the programs after this one fail."""

PARTS = 250_000
"""Lists and objects of a record, by its brackets: two bytes of text are a hundred in memory."""

ENCODING = "where all of a file is written so, rewrite it: iconv -f LATIN1 -t UTF-8 IN > OUT (or -f WINDOWS-1252, ...)"

SHOWN = 500
"""Characters of each text of a record that is told of."""


def parsed(line: bytes) -> Mapping[str, Any]:
    """The object that a line of JSON holds. Raises RecordError."""
    return an_object(decoded(utf8(line)))


def utf8(line: bytes) -> str:
    """Text without the mark that editors on Windows put before a first line. Raises RecordError."""
    try:
        return line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(f"{error.reason} at byte {error.start + 1}", ENCODING) from error


def an_object(value: Any) -> Mapping[str, Any]:
    """Raises RecordError where it is none."""
    if not isinstance(value, dict):
        raise RecordError("is JSON, but no object", "no object")
    return value


def decoded(text: str) -> Any:
    """The value of some JSON. Raises RecordError."""
    check_size(text)
    try:
        value = STRICT.decode(text)
    except ValueError as error:
        raise not_json(error) from error
    except RecursionError as error:
        raise too_deep() from error
    check(value, text)
    return value


def check_size(text: str, start: int = 0) -> None:
    """Raises RecordError where JSON holds too much to be parsed."""
    if text.count("{", start) + text.count("[", start) > PARTS:
        raise RecordError(f"has more than {PARTS} lists and objects", "too many values")


def not_json(error: ValueError) -> RecordError:
    """What is said of JSON that cannot be parsed; Python reads no number of more than 4,300 digits."""
    if isinstance(error, json.JSONDecodeError):
        return RecordError(f"is no JSON: {error.msg} at column {error.colno}", "no JSON")
    return RecordError("is no JSON to work with: a number has thousands of digits", "no JSON")


def check(value: Any, text: str = "") -> None:
    """Raises RecordError where values are too deep in each other, or text is half a character.

    text: where the value came from, if from JSON.
    """
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [part for parts in level for part in _within(parts) if isinstance(part, dict | list)]
        if not level:
            break
    else:
        raise too_deep()
    if "\\u" in text:
        try:
            _SAID.encode(value).encode()
        except UnicodeEncodeError as error:
            raise _half(error) from error


def sound(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON that every program reads can hold it. Raises RecordError.

    Dates become text, bytes base64; what is no number, or infinite, becomes null.
    """
    try:
        _WRITTEN.encode(row).encode()
    except UnicodeEncodeError as error:
        raise _half(error) from error
    except (TypeError, ValueError):
        plain: dict[str, Any] = _plain(row)
        return sound(plain)
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | None) else str(value)


def excerpt(record: Any) -> dict[str, Any]:
    """What can be shown of a record: the beginnings of its texts, its numbers."""
    shown = record.items() if isinstance(record, Mapping) else ()
    return {
        str(key)[:80]: _readable(value) if isinstance(value, str) else value
        for key, value in shown
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }


def not_utf8(what: str, cure: str = "") -> RecordError:
    """What is said of bytes or escapes that no text is made of."""
    return RecordError(f"is no UTF-8 text: {what}", "no UTF-8 text", cure)


def _half(error: UnicodeEncodeError) -> RecordError:
    return not_utf8(f"{error.object[error.start]!a} is half a character")


def _readable(text: str) -> str:
    return text[:SHOWN].encode(errors="replace").decode()


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def too_deep() -> RecordError:
    """What is said of values in values in values."""
    return RecordError(f"is JSON too deeply nested to be a row (more than {DEPTH} levels)", "nested too deeply")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two values of a key counts is up to each program that reads them."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = next(entry for entry in Counter(key for key, _ in pairs).items() if entry[1] > 1)
        raise RecordError(f"has the key {twice!r:.80} twice", "a key twice")
    return found


STRICT = json.JSONDecoder(object_pairs_hook=_once)

_WRITTEN = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_SAID = json.JSONEncoder(ensure_ascii=False)
