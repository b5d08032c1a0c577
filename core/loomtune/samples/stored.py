"""A folder of samples: the layout of its files, reading one, and writing one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Sample, Segment
from loomtune.errors import UserError

FORMAT = 6
"""Version of the folder's layout; part of the key."""

ABOUT = "about.json"

COLUMNS: Mapping[str, str] = {
    "tokens": "<i4",  # of all segments, one after the other
    "is_target": "|b1",
    "token_starts": "<i8",  # where each segment's tokens begin, and where the last one's end
    "parents": "<i4",
    "segment_starts": "<i8",  # the same of each sample's segments
    "lengths": "<i8",  # tokens of all segments of each sample
    "numbers": "<f8",  # of each sample, as many as there are names
    "origins": "|u1",  # of all samples, UTF-8
    "origin_starts": "<i8",
    "rows": "|u1",  # JSON of all rows, where the objective keeps them
    "row_starts": "<i8",
}

STARTS = ("token_starts", "segment_starts", "origin_starts", "row_starts")


class Samples:
    """The samples of one split, or of a window of it, read from disk where they are touched.

    lengths: `(samples,)` int64, tokens of all segments.
    folder: where they lie. key: its name. columns: what is joined to each sample, by row.
    cut, cut_tokens: how many rows were longer than `max_length`, and by how many tokens in all.
    skipped: rows left out because `max_length` cut all that was to be learned from them.
    left_out: what the data say of records that gave no row, as `Data.left_out` has it. told: of a window, which rows
        cannot be learned from.
    sources: how many samples are of each source, in their order; one without a name unless the data mix.
    next: where the next window begins, as `Data.stream` has it; None behind the last, and of a whole split.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder. Raises OSError, ValueError or KeyError where files are not of the size that was written."""
        self.folder, self.key = folder, folder.name
        about, _, sizes = _read(folder / ABOUT)
        column = {name: _open_column(folder / name, kind, sizes[name]) for name, kind in COLUMNS.items()}
        self.columns: dict[str, Any] = {}  # of `loomtune.records`, which imports torch
        self.cut, self.cut_tokens, self.skipped = int(about["cut"]), int(about["cut_tokens"]), int(about["skipped"])
        self.largest_token, self.left_out, self.told = int(about["largest_token"]), about["left_out"], about["told"]
        self.sources: Mapping[str, int] = about["sources"]
        self.next: Any = about["next"]
        self._names: list[str] = about["names"]
        self._tokens, self._is_target, self._parents = column["tokens"], column["is_target"], column["parents"]
        self._numbers = column["numbers"].reshape(-1, len(self._names)) if self._names else column["numbers"]
        self._texts = {name: (column[f"{name}s"], column[f"{name}_starts"]) for name in ("origin", "row")}
        self._token_starts, self._segment_starts = column["token_starts"], column["segment_starts"]
        self.lengths = column["lengths"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a row. Raises IndexError beyond the last, and for negative ones."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first, last = self._segment_starts[index : index + 2]
        segments = tuple(self._segment(number) for number in range(first, last))
        sample = Sample(segments, {name: float(self._numbers[index, i]) for i, name in enumerate(self._names)})
        for name, column in self.columns.items():
            sample = sample.with_column(name, column[index])
        return sample

    def origin(self, index: int) -> str:
        """Where the row was read, as the data said (`file:line`)."""
        return self._text("origin", index)

    def row(self, index: int) -> dict[str, Any]:
        """The row as the data gave it, where the objective keeps rows; what JSON cannot hold is text."""
        row: dict[str, Any] = json.loads(self._text("row", index) or "{}")
        return row

    def _text(self, name: str, index: int) -> str:
        texts, starts = self._texts[name]
        return bytes(texts[starts[index] : starts[index + 1]]).decode()

    def _segment(self, number: int) -> Segment:
        where = slice(self._token_starts[number], self._token_starts[number + 1])
        return Segment(self._tokens[where], self._is_target[where], int(self._parents[number]))


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Around writing to a folder: a disk that is full or cannot be written to is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError.of(
            f"tokenised samples cannot be kept in {folder}: {error}",
            "it must be a folder with space that can be written to: name it by LOOMTUNE_CACHE, or run.dir for streams",
        ) from error


class Writer:
    """Writes the columns of a folder, and last what is to be known about them; all of it is on the disk at the end.

    Raises UserError where the disk takes no more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writable(folder.parent):
            self._files = {name: (folder / name).open("wb") for name in COLUMNS}
        self._digests = {name: hashlib.sha256() for name in COLUMNS}
        self._ends = dict.fromkeys(STARTS, 0)
        for name in STARTS:
            self._put(name, np.zeros(1, np.int64))

    def add(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Appends samples. In the columns that hold starts are the lengths of what begins there."""
        for name, values in columns.items():
            if name in STARTS:
                values = self._ends[name] + np.cumsum(values)  # noqa: PLW2901
                self._ends[name] = int(values[-1]) if len(values) else self._ends[name]
            self._put(name, values)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Nothing more comes."""
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        sizes = {name: file.tell() for name, file in self._files.items()}
        content = {"about": dict(about), "bytes": sizes, "sha256": digests}
        try:
            text = json.dumps({**content, "digest": _digest(content)})
        except (TypeError, ValueError) as error:
            what = f"the data give a place, or words on what is left out, that JSON cannot hold: {error}"
            raise UserError.of(what, "this is a mistake of the data's plugin, in `stream` or `left_out`") from error
        with writable(self._folder.parent), (self._folder / ABOUT).open("wb") as file:
            file.write(text.encode())
            for each in (*self._files.values(), file):
                each.flush()
                os.fsync(each.fileno())

    def close(self) -> None:
        """Lets the files go."""
        for file in self._files.values():
            with suppress(OSError):  # what could not be written was told
                file.close()

    def _put(self, name: str, values: NDArray[Any]) -> None:
        data = values.astype(COLUMNS[name], copy=False).tobytes()
        with writable(self._folder.parent):
            self._files[name].write(data)
        self._digests[name].update(data)


def is_written(folder: Path) -> bool:
    """Whether every byte of the columns is as it was written: reads all of them. Raises OSError, ValueError."""
    digests = _read(folder / ABOUT)[1]
    for name in COLUMNS:
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digests[name]:
                return False
    return True


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, int]]:
    """(what is known, digests, sizes) of `about.json`. Raises ValueError where it is not as it was written."""
    content = json.loads(path.read_text())
    if content.pop("digest") != _digest(content):
        raise ValueError(f"{path.name} is not as it was written")
    return content["about"], content["sha256"], content["bytes"]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _open_column(path: Path, kind: str, size: int) -> NDArray[Any]:
    """Maps a column. Raises ValueError where it has not the size that was written."""
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
    if not size:
        return np.zeros(0, np.dtype(kind))  # nothing cannot be mapped
    return np.memmap(path, dtype=np.dtype(kind), mode="r")
