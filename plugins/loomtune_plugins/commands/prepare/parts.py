"""Rows on disk, in parts of some megabytes, and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Row
from loomtune.errors import RunFailed

BYTES, ROWS = 24 << 20, 50_000
"""Of one part, about: what 16 MB of a file become fits into one."""

STATS = "stats.json"
"""What a task tells of its work, beside its files."""


@contextlib.contextmanager
def committed(place: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name, by one rename, when everything in it is on the disk."""
    draft = place.with_name(f".{place.name}-{uuid4().hex[:8]}")
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in (*draft.iterdir(), draft):
            sync(path)
        try:
            draft.rename(place)
        except OSError:
            if not place.is_dir():  # somebody else did the same task, with the same result
                raise
        sync(place.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync(path: Path) -> None:
    """Sees that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """A small file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}-{uuid4().hex[:8]}")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    sync(draft)
    draft.rename(path)
    sync(path.parent)


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text())


def line_of(row: Row) -> bytes:
    """A row as a line of JSON. Raises RunFailed where a plugin made a row that JSON does not hold."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise RunFailed(f"{row.get('origin', 'a row')} is no row that JSON can hold: {error}") from error


class Lines:
    """Writes lines, and where each begins, so that any of them can be read by itself."""

    def __init__(self, folder: Path, name: str = "rows") -> None:
        self._path, self._starts = folder / f"{name}.npy", [0]
        self._file = (folder / f"{name}.jsonl").open("wb")

    @property
    def size(self) -> int:
        """In bytes."""
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, lines: Iterable[bytes]) -> None:
        """Appends them."""
        for line in lines:
            self._file.write(line)
            self._starts.append(self._starts[-1] + len(line))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
        np.save(self._path, np.array(self._starts, np.int64))


class Generation:
    """The rows between two passes: parts in order, through which rows are counted from 0.

    parts: as `stats.json` of each says, with its folder's name and split.
    """

    def __init__(self, folder: Path, parts: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self.parts = folder, parts
        self.bases = np.cumsum([0, *(part["rows"] for part in parts)]).tolist()

    @classmethod
    def of(cls, folder: Path) -> Generation:
        """Of a phase that is done."""
        return cls(folder, read_json(folder / "done.json")["parts"])

    def __len__(self) -> int:
        return int(self.bases[-1])

    def range(self, number: int) -> tuple[int, int]:
        """First row of a part, and the one after its last."""
        return self.bases[number], self.bases[number + 1]

    def path(self, number: int) -> Path:
        """A part's folder."""
        return self.folder / str(self.parts[number]["part"])

    def lines(self, number: int) -> Iterator[bytes]:
        """A part's rows as they are written."""
        with (self.path(number) / "rows.jsonl").open("rb") as file:
            yield from file

    def row(self, row: int) -> Row:
        """One row, wherever it is."""
        number = self._part(row)
        starts = np.load(self.path(number) / "rows.npy", mmap_mode="r")
        place = row - self.bases[number]
        with (self.path(number) / "rows.jsonl").open("rb") as file:
            file.seek(starts[place])
            found: Row = json.loads(file.read(int(starts[place + 1] - starts[place])))
        return found

    def described(self, number: int) -> NDArray[Any]:
        """What a link compares of a part's rows, mapped from the disk."""
        array: NDArray[Any] = np.load(self.path(number) / "described.npy", mmap_mode="r")
        return array

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """What a link compares of some rows, wherever they are, in their order."""
        parts = np.searchsorted(self.bases, rows, side="right") - 1
        taken: NDArray[Any] | None = None
        for number in np.unique(parts):
            there = self.described(int(number))
            taken = np.empty((len(rows), *there.shape[1:]), there.dtype) if taken is None else taken
            chosen = parts == number
            taken[chosen] = there[rows[chosen] - self.bases[number]]
        assert taken is not None
        return taken

    def _part(self, row: int) -> int:
        return bisect_right(self.bases, row) - 1
