"""What reads one kind of file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loomtune.errors import Fault
from loomtune_plugins.data.paths import absences, find
from loomtune_plugins.data.scan import scan
from loomtune_plugins.data.values import RecordError

Record = Mapping[str, Any]
Numbered = tuple[int, Record | RecordError]
"""A record's number, from 1, with what it holds or what is wrong with it."""

WHOLE: Mapping[str, Any] = {}
"""The part of a file that is all of it."""


class Reader(ABC):
    """Gives a file's records, whatever it holds, within limits of memory."""

    @abstractmethod
    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        """Those of the file, or of one of its parts. Raises UserError where what follows cannot be told apart."""

    def glimpse(self, path: Path) -> Iterator[Numbered]:
        """The records from the first on, where few of them will be asked for."""
        return self.records(path)

    def parts(self, path: Path) -> Sequence[Mapping[str, Any]]:
        """Plain data that say which parts can be read by themselves, some megabytes each."""
        return [WHOLE]

    def find(self, patterns: str) -> list[Path]:
        """The files that a setting names."""
        return find(patterns)

    def absences(self, name: str, patterns: str) -> Iterator[Fault]:
        """What of it is not there. name: the setting's."""
        return absences(name, patterns)

    def stream(self, path: Path) -> Iterator[Numbered]:
        """The records from the first on, of a file that is too large to be fetched as a whole."""
        return self.records(path)

    def stamp(self, path: Path) -> str:
        """What changes with the file, as far as can be seen without reading it: its size, and when it was changed."""
        found = path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def digest(self, path: Path) -> str:
        """Of everything that the records of a file depend on."""
        return scan(path).digest
