"""Rows that `loomtune prepare` wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError
from loomtune_plugins.data.columns import Columns
from loomtune_plugins.data.files import VERSION, Files, undecided
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.limits import Limits
from loomtune_plugins.data.manifest import NAME, SPLITS, Manifested
from loomtune_plugins.data.ordered import faults
from loomtune_plugins.data.prepared_settings import PreparedSettings
from loomtune_plugins.data.sources import KEYS
from loomtune_plugins.data.values import is_label

CURE = (
    "leave out data.format, data.pairs, data.min_gap or data.threshold, or prepare rows of each format into a folder "
    "of their own"
)


class Prepared(Files):
    """A folder whose manifest says which files there are, and what is in them to the byte."""

    def __init__(self, settings: PreparedSettings) -> None:
        own = FileSettings(**asdict(settings))
        self._folder = Path(settings.path).expanduser()
        super().__init__(
            own,
            Manifested(Limits.of(own), self._folder),
            undecided,
            partial(_Shapes, own),
            faults(own),
            "prepare the data again",
            patterns={split: split for split in SPLITS},
        )

    def splits(self) -> tuple[str, ...]:
        """Those that hold a row."""
        return tuple(split for split in self._patterns if self._paths(split))

    def fingerprint(self) -> str:
        """Digest of the manifest, which has the files' own, and of the settings. Raises UserError for changed ones.

        Those of a stream are held to it once they are read.
        """
        for split in self.splits():
            for path in () if self.window and split == "train" else self._paths(split):
                self._reader.digest(path)
        settings = asdict(self.settings) | {"path": ""}
        digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode())
        digest.update((self._folder / NAME).read_bytes())
        return digest.hexdigest()


class _Shapes:
    """Rows that came of several sources lie in one file: what a row's keys mean is decided for each kind of row."""

    def __init__(self, settings: FileSettings, _chosen: Mapping[str, Any]) -> None:
        self._settings, self._known = settings, dict[Any, Columns]()

    def of_record(self, record: Mapping[str, Any], origin: str) -> tuple[Any, list[dict[str, Any]]]:
        """As the columns give it; where the row was read at first stays."""
        return self._columns(record, origin).of_record(record, _origin(record, origin))

    def canonical(self, record: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
        """The row as it is, as far as it is one."""
        return self._columns(record, origin).canonical(record, _origin(record, origin))

    def _columns(self, record: Mapping[str, Any], origin: str) -> Columns:
        has = (*(key for key in KEYS if key in record), is_label(record.get("label")))
        shape = (*has, isinstance(record.get("chosen"), list))
        if shape not in self._known:
            try:
                self._known[shape] = Columns.of(self._settings, Columns.decided(self._settings, record, origin))
            except UserError as error:
                raise UserError(*(Fault(fault.what, CURE) for fault in error.faults)) from error
        return self._known[shape]


def _origin(record: Mapping[str, Any], origin: str) -> str:
    first = record.get("origin")
    return first if isinstance(first, str) else origin
