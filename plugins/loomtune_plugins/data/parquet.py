"""Rows from Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from loomtune.errors import UserError
from loomtune_plugins.data.columns import Columns
from loomtune_plugins.data.files import Files, Record
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.sources import faults
from loomtune_plugins.data.values import RecordError

_BATCH = 1024


class Parquet(Files):
    """Records of Parquet files, a batch of rows in memory at a time."""

    def __init__(self, settings: FileSettings) -> None:
        cure = "mend these rows, or leave them out of the file"
        super().__init__(settings, read, partial(Columns.of, settings), faults(settings), cure)


def read(path: Path) -> Iterator[tuple[int, Record | RecordError]]:
    """Row numbers from 1 and records. Raises UserError where it is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_BATCH)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError) as error:
        cure = "set data=jsonl" if ".json" in path.name else "check the file and data.path"
        raise UserError.of(f"{path} is no readable Parquet file: {error}", cure) from error
