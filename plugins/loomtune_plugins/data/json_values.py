"""Records of one JSON array, or of objects one after another."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loomtune.errors import UserError
from loomtune_plugins.data.limits import Limits, opened_text
from loomtune_plugins.data.reader import WHOLE, Numbered, Reader, Record
from loomtune_plugins.data.text import ENCODING, STRICT, an_object, check, check_size, not_json, not_utf8, too_deep
from loomtune_plugins.data.values import RecordError

_BLOCK = 1 << 18

_SPACE = re.compile(r"[ \t\n\r]*")

_LENIENT = json.JSONDecoder(parse_int=lambda digits: 0)
"""Finds the end of what `STRICT` refuses."""


@dataclass(frozen=True)
class JsonValues(Reader):
    """Streams: of the file, no more is held than one record and what was read beside it."""

    limits: Limits

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        """Numbered from 1. Raises UserError where the end of a record cannot be found."""
        number = 0
        with opened_text(path, self.limits) as file:
            try:
                for number, record in enumerate(_Text(file, self.limits).records(), start=1):
                    yield number, record
            except RecordError as error:
                cure = "mend the file, or rewrite it as JSON lines (.jsonl), which are read each by itself"
                if not number and error.reason == "too long":
                    cure += f"; of one object that holds all rows in a list: {taken_out(path, 'data')}"
                what = f"{path}:{number + 1}: {error}, so that nothing after it can be told apart"
                raise UserError.of(what, cure) from error


def taken_out(path: Path, name: str) -> str:
    """The command that writes the objects of a list in a file's only object as JSON lines."""
    step = f".{name}" if name.isidentifier() and name.isascii() else f".[{json.dumps(name)}]"
    return f"jq -c '{step}[]' {path} > {path.with_suffix('.jsonl')}"


class _Text:
    """A window on the text of a file: from the record that is read to some way after it."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self._file, self._limits, self._text, self._at = file, limits, "", 0
        # Bytes that are no UTF-8 are found in the record where they stand, and do not end the reading.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def records(self) -> Iterator[Record | RecordError]:
        """All of them. Raises RecordError where what follows cannot be told apart."""
        if self._next() != "[":
            while self._next():
                yield self._record()
            return
        self._at += 1
        follows = self._next()
        while follows != "]":
            yield self._record()
            follows = self._next()
            if follows not in (",", "]"):
                raise RecordError("has neither ',' nor ']' before it")
            self._at += follows == ","
        self._at += 1
        if self._next():
            raise RecordError("stands after the end of the array")

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it fits nothing too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def _read_on(self) -> bool:
        block = self._file.read(max(_BLOCK, len(self._text) - self._at))  # what is read again and again stays in bounds
        self._text, self._at = self._text[self._at :] + self._decoder.decode(block, final=not block), 0
        return bool(block)

    def _record(self) -> Record | RecordError:
        """The next one; the text is read on until it is there as a whole. Raises RecordError where it never is."""
        self._next()
        value, end = self._parsed()
        while end in (None, len(self._text)):
            is_held = len(self._text) - self._at <= self._limits.record
            check_size(self._text, self._at)
            if not is_held or not self._read_on():
                break
            value, end = self._parsed()
        if end is None:
            raise value if is_held else RecordError(f"{value}, or {self._limits.too_long}", "too long")
        said, self._at = self._text[self._at : end], end
        return value if isinstance(value, RecordError) else self._checked(value, said)

    def _parsed(self) -> tuple[Any, int | None]:
        """(the value that begins here, or what is wrong with it; where it ends, None where that cannot be seen)."""
        try:
            return STRICT.raw_decode(self._text, self._at)
        except RecordError as error:
            fault = error
        except json.JSONDecodeError as error:
            return RecordError(f"is no JSON: {error.msg}", "no JSON"), None
        except ValueError as error:
            fault = not_json(error)
        except RecursionError:
            return too_deep(), None
        with contextlib.suppress(json.JSONDecodeError):
            return fault, _LENIENT.raw_decode(self._text, self._at)[1]
        return fault, None

    def _checked(self, value: Any, said: str) -> Record | RecordError:
        try:
            if len(said.encode()) > self._limits.record:
                return self._limits.too_long
            check(value, said)
            return an_object(value)
        except UnicodeEncodeError:
            return not_utf8("some of its bytes stand for no character", ENCODING)
        except RecordError as error:
            return error
