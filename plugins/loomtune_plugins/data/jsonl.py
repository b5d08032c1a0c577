"""Rows from JSON lines."""

from __future__ import annotations

import bz2
import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from loomtune.errors import UserError
from loomtune_plugins.data.columns import Columns
from loomtune_plugins.data.files import Files, Record
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.sources import faults
from loomtune_plugins.data.values import RecordError


class Jsonl(Files):
    """One JSON object a line; empty lines are passed over. `.gz` and `.bz2` are read as they are."""

    def __init__(self, settings: FileSettings) -> None:
        cure = "mend these lines, or leave them out of the file"
        super().__init__(settings, read, partial(Columns.of, settings), faults(settings), cure)


def read(path: Path) -> Iterator[tuple[int, Record | RecordError]]:
    """Line numbers and objects. Raises UserError where the file is something else altogether."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.lstrip()[:1] == b"[":
                    raise _array(path)
                if not line.isspace():
                    yield number, _parse(line)
    except (OSError, EOFError, zlib.error) as error:  # gzip and bz2 raise each of them for broken archives
        raise UserError.of(f"{path} cannot be read: {error}", "check the file and data.path") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".parquet":
        raise UserError.of(f"{path} is a Parquet file", "set data=parquet")
    return path.open("rb")


def _parse(line: bytes) -> Record | RecordError:
    try:
        # `utf-8-sig`: editors on Windows put a byte order mark before the first line.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RecordError(f"is no UTF-8 text: {error.reason} at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return RecordError(f"is no JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RecordError("is JSON too deeply nested to be a row")
    return record if isinstance(record, dict) else RecordError("is JSON, but no object")


def _array(path: Path) -> UserError:
    return UserError.of(
        f"{path} begins with '[': it is one JSON array, not one object a line",
        f"rewrite it, for instance by: jq -c '.[]' {path} > {path.with_suffix('.jsonl')}",
    )
