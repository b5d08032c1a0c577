"""Rows from files of whatever kind their names say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError, near
from loomtune_plugins.data.any_files_settings import AnyFileSettings
from loomtune_plugins.data.arrow import ArrowBatches, RowGroups
from loomtune_plugins.data.columns import ColumnFiles
from loomtune_plugins.data.delimited import Delimited
from loomtune_plugins.data.json_values import JsonValues
from loomtune_plugins.data.jsonl import JsonLines
from loomtune_plugins.data.limits import ARCHIVES, Limits, packing
from loomtune_plugins.data.reader import WHOLE, Numbered, Reader
from loomtune_plugins.data.turns import SHAREGPT

_NO_TEXT = ("messages", "answers", "ranks", "scores", "label", "score")
"""Keys whose cells in a table of text hold JSON."""


class AnyFiles(ColumnFiles):
    """JSON lines, JSON, tables of text, Parquet and Arrow, packed or not, in any mixture."""

    def __init__(self, settings: AnyFileSettings) -> None:
        super().__init__(settings, ByName(settings))
        self._faults += _faults(settings)


class ByName(Reader):
    """Reads a file as its name says, whatever the case of its letters."""

    def __init__(self, settings: AnyFileSettings) -> None:
        limits = Limits.of(settings)
        columns = [SHAREGPT, *(getattr(settings, key) or key for key in _NO_TEXT)]
        values = {*columns, *(column.split(".")[0] for column in columns)}
        lines, arrow = JsonLines(limits), ArrowBatches(limits)
        self._kinds: Mapping[str, Reader] = {
            ".jsonl": lines,
            ".ndjson": lines,
            ".json": JsonValues(limits),
            ".csv": Delimited(limits, settings.delimiter, values),
            ".tsv": Delimited(limits, "\t", values),
            ".parquet": RowGroups(limits),
            ".arrow": arrow,
        }

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        return self._of(path).records(path, part)

    def parts(self, path: Path) -> Sequence[Mapping[str, Any]]:
        return self._of(path).parts(path)

    def _of(self, path: Path) -> Reader:
        """Raises UserError where the name says nothing."""
        inner = path.with_suffix("") if packing(path) else path
        if (reader := self._kinds.get(inner.suffix.lower())) is None:
            known = ", ".join(self._kinds)
            told = f"{path} is an archive in an archive" if packing(inner) else f"{path} is of no known kind"
            cure = f"name it by what it holds: {known}, each also {', '.join(ARCHIVES)}"
            raise UserError.of(f"{told}.{near(inner.suffix, self._kinds)}", cure)
        return reader


def _faults(settings: AnyFileSettings) -> Iterator[Fault]:
    if len(settings.delimiter) != 1 or settings.delimiter in '"\r\n':
        yield Fault(
            f"data.delimiter={settings.delimiter!r} is not one character", "set data.delimiter=';', for example"
        )
