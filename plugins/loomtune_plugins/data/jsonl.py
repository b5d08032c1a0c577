"""Rows from JSON lines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune.errors import UserError
from loomtune_plugins.data.columns import ColumnFiles
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.limits import Limits, lines, opened_text, packing
from loomtune_plugins.data.reader import WHOLE, Numbered, Reader
from loomtune_plugins.data.scan import scan
from loomtune_plugins.data.text import parsed
from loomtune_plugins.data.values import tried


class Jsonl(ColumnFiles):
    """One JSON object a line; empty lines are passed over. `.gz`, `.bz2` and `.zst` are read as they are."""

    def __init__(self, settings: FileSettings) -> None:
        super().__init__(settings, JsonLines(Limits.of(settings)))


@dataclass(frozen=True)
class JsonLines(Reader):
    """Numbers are those of lines. Plain files fall into parts; those of an archive cannot be read apart."""

    limits: Limits

    def parts(self, path: Path) -> Sequence[Mapping[str, Any]]:
        if packing(path):
            return [WHOLE]
        found = scan(path)
        starts = [*found.starts, (found.size, 0)]
        return [
            {"start": start, "stop": stop, "line": line, "size": found.size}
            for (start, line), (stop, _) in itertools.pairwise(starts)
        ]

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        if path.suffix == ".parquet":
            raise UserError.of(f"{path} is a Parquet file", "set data=parquet")
        with opened_text(path, self.limits) as file:
            if part:
                _unchanged(path, part)
                file.seek(part["start"])
            found = lines(file, self.limits, part.get("stop"))
            for number, (line, is_whole) in enumerate(found, start=part.get("line", 1)):
                if not is_whole:
                    yield number, self.limits.too_long
                elif number == 1 and line.lstrip()[:1] == b"[":
                    raise _array(path)
                elif not line.isspace():
                    yield number, tried(parsed, line)


def _unchanged(path: Path, part: Mapping[str, Any]) -> None:
    if path.stat().st_size != part["size"]:
        raise UserError.of(f"{path} was changed while it was read", "start again, and let nothing write to it")


def _array(path: Path) -> UserError:
    return UserError.of(
        f"{path} begins with '[': it is one JSON array, not one object a line",
        f"set data=files, which reads arrays in files named .json; or rewrite it, for instance by: jq -c '.[]' {path} "
        f"> {path.with_suffix('.jsonl')}",
    )
