"""Records from what Arrow reads: Parquet's row groups, and Arrow's own batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune.errors import UserError
from loomtune_plugins.data.limits import Limits, seekable
from loomtune_plugins.data.reader import WHOLE, Numbered, Reader, Record
from loomtune_plugins.data.scan import PIECE
from loomtune_plugins.data.text import check, not_utf8
from loomtune_plugins.data.values import RecordError, tried

_BATCH = 8
"""Rows of a Parquet file that are held at once: few, because a dictionary makes many large ones of a small file."""

_SMALL = 64 << 20
"""Bytes that any row group may declare."""


@dataclass(frozen=True)
class RowGroups(Reader):
    """Parquet. A part is as many row groups as hold some megabytes."""

    limits: Limits

    def parts(self, path: Path) -> Sequence[Mapping[str, Any]]:
        with _readable(path, "Parquet"), _parquet(path, self.limits) as file:
            found, row = list[dict[str, Any]](), 1
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                if not found or found[-1]["bytes"] + about.total_byte_size > PIECE:
                    found.append({"groups": [], "row": row, "bytes": 0})
                found[-1]["groups"].append(group)
                found[-1]["bytes"] += about.total_byte_size
                row += about.num_rows
        return found

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        """Row numbers from 1 and records. Raises UserError where it is no Parquet file."""
        with _readable(path, "Parquet"), _parquet(path, self.limits) as file:
            groups = part.get("groups", range(file.metadata.num_row_groups))
            self._refuse_bombs(path, file.metadata, groups)
            batches = file.iter_batches(batch_size=_BATCH, row_groups=[*groups], use_threads=False)
            found = (record for batch in batches for record in records(batch, self.limits))
            yield from enumerate(found, start=part.get("row", 1))

    def _refuse_bombs(self, path: Path, metadata: Any, groups: Sequence[int]) -> None:
        """A few bytes can stand for any number of equal values; each takes memory when it is read."""
        allowed = max(_SMALL, self.limits.growth * path.stat().st_size)
        for group in map(metadata.row_group, groups):
            values = sum(group.column(number).num_values for number in range(group.num_columns))
            if max(group.total_byte_size, 8 * values) > allowed:
                raise UserError.of(
                    f"{path} unpacks to more than {allowed} bytes",
                    "if it is what you expect, set a larger data.max_growth; else leave it out",
                )


@dataclass(frozen=True)
class ArrowBatches(Reader):
    """Arrow's IPC format, as a file or as a stream."""

    limits: Limits

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        with _readable(path, "Arrow"), seekable(path, self.limits) as file:
            found = (record for batch in _batches(file) for record in records(batch, self.limits))
            yield from enumerate(found, start=1)


def records(batch: Any, limits: Limits) -> Iterator[Record | RecordError]:
    """Those of a batch of Arrow's; one that is too long becomes none of Python's."""
    if batch.nbytes <= limits.record:
        with contextlib.suppress(UnicodeDecodeError):
            yield from (tried(_checked, record) for record in batch.to_pylist())
            return
    for row in (batch.slice(number, 1) for number in range(batch.num_rows)):
        if row.nbytes > limits.record:
            yield limits.too_long
            continue
        try:
            record = row.to_pylist()[0]
        except UnicodeDecodeError as error:
            yield not_utf8(f"{error.reason} in a column of text")
            continue
        yield tried(_checked, record)


def _checked(record: Record) -> Record:
    check(record)
    return record


@contextlib.contextmanager
def _parquet(path: Path, limits: Limits) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with seekable(path, limits) as source, pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20) as file:
        yield file


def _batches(file: Any) -> Iterator[Any]:
    """Each is looked through before use: offsets that lie would be followed anywhere in memory."""
    import pyarrow as pa

    try:
        opened = pa.ipc.open_file(file)
        found: Iterator[Any] = map(opened.get_batch, range(opened.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(0)
        found = iter(pa.ipc.open_stream(file))
    for batch in found:
        batch.validate(full=True)
        yield batch


@contextlib.contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Raises UserError for whatever Arrow finds wrong with a file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
        cure = "set data=jsonl, or data=files" if ".json" in path.name else "check the file and data.path"
        raise UserError.of(f"{path} is no readable {kind} file: {error}", cure) from error
