"""Settings of files of any kind."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.data.files_settings import FileSettings


@dataclass
class AnyFileSettings(FileSettings):
    """Which files, which of their columns mean what, and how tables of text are read."""

    delimiter: str = option(",", "what stands between the cells of .csv files")
