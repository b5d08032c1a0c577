"""Rows from Parquet files."""

from __future__ import annotations

from loomtune_plugins.data.arrow import RowGroups
from loomtune_plugins.data.columns import ColumnFiles
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.limits import Limits


class Parquet(ColumnFiles):
    """Records of Parquet files, a few rows in memory at a time."""

    def __init__(self, settings: FileSettings) -> None:
        super().__init__(settings, RowGroups(Limits.of(settings)))
