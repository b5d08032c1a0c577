"""Settings of data sets that the library `datasets` reads."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.data.files_settings import FileSettings


@dataclass
class HubSettings(FileSettings):
    """Which data set, which of its splits are ours, and which of their columns mean what."""

    path: str = option("", "folder made by save_to_disk, folder of files, or owner/name on the hub")
    config: str = option("", "which of a data set's configurations")
    revision: str = option("", "commit, tag or branch on the hub; without one, data may change between two runs")
    train: str = option("train", "split of training rows, as `datasets` writes it: train, train[:90%], train+extra")
    validation: str = option("", "split of validation rows")
    test: str = option("", "split of test rows")
