"""The files that a manifest lists, held to what it says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError
from loomtune_plugins.data.jsonl import JsonLines
from loomtune_plugins.data.limits import regular
from loomtune_plugins.data.reader import WHOLE, Numbered
from loomtune_plugins.data.scan import scan
from loomtune_plugins.data.text import parsed
from loomtune_plugins.data.values import RecordError

NAME = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")

_LARGEST = 64 << 20
"""Bytes of a manifest."""

_AGAIN = "prepare the data again, or restore what was written then"


@dataclass(frozen=True)
class Manifested(JsonLines):
    """Reads a file of a folder only where it is what was prepared. Each split is found by its name."""

    folder: Path

    def find(self, patterns: str) -> list[Path]:
        """The files of a split, in the manifest's order. Raises UserError where there is no such manifest."""
        return [self.folder / entry["name"] for entry in self._listed.values() if entry["split"] == patterns]

    def absences(self, name: str, patterns: str) -> Iterator[Fault]:
        """Files that are gone, changed in size, or not in the manifest; told once, of `path`."""
        if name == "path":
            yield from self._changes()

    def digest(self, path: Path) -> str:
        """As the manifest has it. Raises UserError where the file differs."""
        if (digest := scan(path).digest) != self._listed[path.name]["sha256"]:
            raise UserError.of(f"{path} was changed since it was prepared", _AGAIN)
        return digest

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        """Raises UserError where the file is not what was prepared."""
        self.digest(path)
        return super().records(path, part)

    def glimpse(self, path: Path) -> Iterator[Numbered]:
        return super().records(path)

    @cached_property
    def _listed(self) -> Mapping[str, Mapping[str, Any]]:
        """Name to entry. Raises UserError where a name is none of a file of this folder."""
        return {entry["name"]: entry for entry in _entries(self.folder)}

    def _changes(self) -> Iterator[Fault]:
        for name, entry in self._listed.items():
            path = self.folder / name
            if not path.exists():
                yield Fault(f"{path} is gone since it was prepared", _AGAIN)
            elif not regular(path) or path.resolve().parent != self.folder.resolve():
                yield Fault(f"{path} is no file of this folder: it leads out of it, or is none", _AGAIN)
            elif (size := path.stat().st_size) != entry["bytes"]:
                told = f"{path} was changed since it was prepared: it has {size} bytes, and had {entry['bytes']}"
                yield Fault(told, _AGAIN)
        for path in sorted(path for split in SPLITS for path in self.folder.glob(f"{split}-*.jsonl")):
            if path.name not in self._listed:
                yield Fault(f"{path} was not there when {self.folder} was prepared", f"delete it, or {_AGAIN}")


def _entries(folder: Path) -> Sequence[Mapping[str, Any]]:
    path = folder / NAME
    if not regular(path):
        cure = "set data.path to a folder that `loomtune prepare` finished; the same command goes on where it stopped"
        raise UserError.of(f"{folder} holds no {NAME}", cure)
    try:
        if path.stat().st_size > _LARGEST:
            raise RecordError(f"is larger than {_LARGEST} bytes")
        manifest = parsed(path.read_bytes())
        if manifest.get("format") != FORMAT:
            raise RecordError("is of another format")
        entries: Sequence[Mapping[str, Any]] = manifest["files"]
        for entry in entries:
            _check(entry)
    except (RecordError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError.of(f"{path} is no manifest of prepared data: {error}", "prepare the data again") from error
    return entries


def _check(entry: Mapping[str, Any]) -> None:
    """Raises what `_entries` tells of."""
    name, size, digest = entry["name"], entry["bytes"], entry["sha256"]
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise RecordError(f"it names {name!r:.200}, which is no file of its folder")
    if not isinstance(size, int) or not isinstance(digest, str) or not isinstance(entry["split"], str):
        raise RecordError(f"what it says of {name} makes no sense")
