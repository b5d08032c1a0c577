"""Records of tables in text: a header, then cells with something between them (RFC 4180)."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune.errors import UserError
from loomtune_plugins.data.limits import Limits, lines, opened_text
from loomtune_plugins.data.reader import WHOLE, Numbered, Reader
from loomtune_plugins.data.text import decoded, utf8
from loomtune_plugins.data.values import RecordError, tried

SEPARATOR = "set data.delimiter to what stands between the cells of a .csv, such as ';'; with tabs, name it .tsv"

_OTHERS = ",;|\t"
"""What separates the cells of most tables, and stands in no column's name."""


@dataclass(frozen=True)
class Delimited(Reader):
    """Numbers are those of the lines where records begin. values: columns whose cells hold JSON where they can.

    What separates cells is said and never guessed: a guess goes by a few lines, and text is full of commas.
    """

    limits: Limits
    delimiter: str
    values: Collection[str]

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        """Raises UserError where the header is none."""
        csv.field_size_limit(max(csv.field_size_limit(), 2 * self.limits.record))  # `_Lines` says it better
        with opened_text(path, self.limits) as file:
            found = _cells(_Lines(lines(file, self.limits), self.limits), self.delimiter)
            header = _header(path, next(found, None))
            for number, cells in found:
                if cells != []:
                    yield number, tried(self._record, header, cells)

    def _record(self, header: list[str], cells: list[str] | RecordError) -> Mapping[str, Any]:
        if isinstance(cells, RecordError):
            raise cells
        if len(cells) != len(header):
            what = f"has {len(cells)} cells, and the header has {len(header)}"
            raise RecordError(what, "another number of cells")
        named = zip(header, cells, strict=True)
        return {name: _value(cell) if name in self.values else cell for name, cell in named}


class _Lines:
    """The lines that `csv` asks for. number: of the last. fault: what is wrong with one since `begin`."""

    def __init__(self, found: Iterator[tuple[bytes, bool]], limits: Limits) -> None:
        self._found, self._limits = found, limits
        self.number, self._held = 0, 0
        self.fault: RecordError | None = None

    def begin(self) -> None:
        """Another record follows."""
        self._held, self.fault = 0, None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Raises UserError where a record does not end. Of a line left out, its quote stays: it says where it does."""
        line, is_whole = next(self._found)
        self.number += 1
        self._held += len(line)
        if self._held > self._limits.record + len(line):
            raise UserError.of(
                f"a cell in quotes does not end within data.max_record={self._limits.record} bytes, so that nothing "
                "after it can be told apart",
                "close its quotes, or set a larger data.max_record",
            )
        if not is_whole:
            self.fault = self._limits.too_long
            return line.decode()
        try:
            return utf8(line)
        except RecordError as error:
            self.fault = error
            return line.decode(errors="replace")


def _cells(found: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | RecordError]]:
    reader = csv.reader(found, delimiter=delimiter, strict=True)
    while True:
        found.begin()
        number = found.number + 1
        try:
            cells: list[str] | RecordError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = RecordError(f"is no table of text: {error}", "no CSV", SEPARATOR)
        yield number, found.fault or cells


def _header(path: Path, first: tuple[int, list[str] | RecordError] | None) -> list[str]:
    """The names of the columns. Raises UserError."""
    names = first[1] if first else ["nothing"]
    if isinstance(names, RecordError):
        cure = names.cure or "give a first line with the names of the columns"
        raise UserError.of(f"{path}:1: the header {names}", cure)
    told = ", ".join(names)[:300]
    if len({*names}) < len(names) or not all(names):
        cure = f"give each column a name of its own, or {SEPARATOR}"
        raise UserError.of(f"{path}:1: the header has a name twice, or an empty one: {told}", cure)
    if len(names) == 1 and {*told} & {*_OTHERS}:
        raise UserError.of(f"{path}:1: the header names one column only: {told}", SEPARATOR)
    return names


def _value(cell: str) -> Any:
    """The list, number or truth that a cell says; of any other, its text. Raises RecordError."""
    try:
        value = decoded(cell.lower() if cell in ("True", "False") else cell)
    except RecordError as error:
        if error.reason == "no JSON":
            return cell
        raise
    return value if isinstance(value, list | bool | int | float) else cell
