"""Tokenised samples, made once and then memory-mapped by every rank.

A split's samples lie in a folder of plain arrays, named by a digest of everything that they depend on: another file,
mapping, objective, tokenizer or length is another folder, and nothing stale is ever read. A folder is filled under
another name and renamed: what has its name is whole. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Data, Objective, Row, Sample, Segment, Tokenizer
from loomtune.contracts.batch import NO_PARENT
from loomtune.contracts.objective import UNCUT
from loomtune.errors import UserError

FORMAT = 3
"""Version of the folder's layout; part of the key."""

SHOWN = 5
"""How many rows that cannot be learned from are told one by one."""

LEAVES_OUT = 0.01
"""Largest share of rows that may be left out because `max_length` cuts their whole answer; beyond, it is a mistake."""

_UNFINISHED = ".unfinished-"
_ABANDONED = 7 * 24 * 3600.0
"""Seconds after which nobody fills a folder any more."""

_COLUMNS: Mapping[str, str] = {
    "tokens": "<i4",  # of all segments, one after the other
    "is_target": "|b1",
    "segment_lengths": "<i4",
    "parents": "<i4",
    "segment_counts": "<i4",  # of each sample
    "numbers": "<f8",  # of each sample, as many as there are names
    "origins": "|u1",  # of all samples, UTF-8
    "origin_lengths": "<i4",
}


class Samples:
    """The samples of one split, read from disk where they are touched.

    lengths: `(samples,)` int64, tokens of all segments.
    folder: where they lie. key: its name. columns: what is joined to each sample, by row.
    cut, cut_tokens: how many rows were longer than `max_length`, and by how many tokens in all.
    skipped: rows left out because `max_length` cut all that was to be learned from them.
    left_out: what the data say of records that gave no row, as `Data.left_out` has it.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder. Raises OSError, ValueError or KeyError where it is not whole."""
        about = json.loads((folder / "about.json").read_text())
        column = {name: _open_column(folder / name, kind, about["bytes"][name]) for name, kind in _COLUMNS.items()}
        self.folder, self.key = folder, folder.name
        self.columns: dict[str, Any] = {}  # of `loomtune.records`, which imports torch
        self.cut, self.cut_tokens, self.skipped = int(about["cut"]), int(about["cut_tokens"]), int(about["skipped"])
        self.largest_token, self.left_out = int(about["largest_token"]), about["left_out"]
        self._names: list[str] = about["names"]
        self._tokens, self._is_target, self._parents = column["tokens"], column["is_target"], column["parents"]
        self._numbers = column["numbers"].reshape(-1, len(self._names)) if self._names else column["numbers"]
        self._origins = column["origins"]
        self._origin_starts = _starts(column["origin_lengths"])
        self._token_starts = _starts(column["segment_lengths"])
        self._segment_starts = _starts(column["segment_counts"])
        self.lengths = np.diff(self._token_starts[self._segment_starts])

    def __len__(self) -> int:
        return len(self._segment_starts) - 1

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
        start, end = self._origin_starts[index : index + 2]
        return bytes(self._origins[start:end]).decode()

    def _segment(self, number: int) -> Segment:
        where = slice(self._token_starts[number], self._token_starts[number + 1])
        return Segment(self._tokens[where], self._is_target[where], int(self._parents[number]))


def chain(sample: Sample) -> int:
    """Tokens of the longest chain of segments, from one without a parent to its last descendant."""
    ends: list[int] = []
    for segment in sample.segments:
        before = 0 if segment.parent == NO_PARENT else ends[segment.parent]
        ends.append(before + len(segment.tokens))
    return max(ends, default=0)


def default_cache() -> Path:
    """Where samples are kept: `$LOOMTUNE_CACHE`, or `~/.cache/loomtune/samples`."""
    named = os.environ.get("LOOMTUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "loomtune" / "samples"


def open_samples(cache: Path, key: str) -> Samples:
    """Samples that `prepare` made. Raises UserError where they are gone or not whole."""
    try:
        return Samples(cache / key)
    except (OSError, ValueError, KeyError) as error:
        raise UserError.of(
            f"the tokenised samples in {cache / key} cannot be read: {error}",
            "start the run again, which makes them anew; every rank must see the folder that LOOMTUNE_CACHE names",
        ) from error


def of_run(folder: Path) -> dict[str, Samples]:
    """A run's samples by split, which were tokenised before any process of it existed."""
    placed = json.loads((folder / "samples.json").read_text())
    return {split: open_samples(Path(place["cache"]), place["key"]) for split, place in placed.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """All that the samples of a split are made of. max_length: tokens of the longest chain."""

    data: Data
    objective: Objective
    tokenizer: Tokenizer
    split: str
    max_length: int

    @property
    def key(self) -> str:
        """Digest of everything that the samples depend on."""
        made_of = self.data.fingerprint(), self.split, self.objective.fingerprint(), self.tokenizer.fingerprint
        return hashlib.sha256(json.dumps([FORMAT, *made_of, self.max_length]).encode()).hexdigest()

    def samples(self, row: Row) -> tuple[Sequence[Sample], int]:
        """A row's samples, and how many tokens the cut took. Raises ValueError where the row cannot be learned from.

        Only a sample by itself that fills `max_length` can have lost any, and is made again uncut.
        """
        made = self.objective.samples(row, self.tokenizer, self.max_length)
        if len(made) > 1 or chain(made[0]) < self.max_length:
            return made, 0
        return made, self.objective.sample(row, self.tokenizer, UNCUT).length - made[0].length


def prepare(source: Source, cache: Path, vocabulary: int) -> Samples:
    """The samples of a split, from the cache or made now; safe beside other processes that make the same.

    vocabulary: every token id must be smaller.
    Raises UserError, which names rows, for rows that the objective refuses or that have no target, for token ids that
    the model does not have, and for a training split without rows.
    """
    key = source.key
    samples = _valid(cache / key)
    if samples is None:
        making = _temporary(cache)
        try:
            _make(making, source)
            _publish(making, cache / key)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        samples = Samples(cache / key)
    if samples.largest_token >= vocabulary:
        raise _foreign_token(samples, vocabulary)
    return samples


@dataclass
class _Refusals:
    """Rows that cannot be learned from: all are counted, the first are remembered."""

    split: str
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, origin: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"\n  {origin}: {reason}")

    def join(self, other: _Refusals) -> None:
        """Takes over what another remembered."""
        self.count, self.first = self.count + other.count, [*self.first, *other.first][:SHOWN]

    def error(self, rows: int) -> UserError:
        more = f"\n  and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return UserError.of(
            f"{self.count} of {rows} rows of split {self.split} cannot be learned from:{''.join(self.first)}{more}",
            "mend these rows, read them otherwise, or take them out; where max_length cut answers away, raise it",
        )


def _make(folder: Path, source: Source) -> None:
    """Tokenises rows into a folder. Raises UserError once all rows were seen."""
    split = source.split
    refusals, cut_away, count = _Refusals(split), _Refusals(split), 0
    with _Writer(folder) as writer:
        for count, row in enumerate(source.data.rows(split), start=1):
            origin = str(row.get("origin", f"{split}:{count}"))
            try:
                made, lost = source.samples(row)
            except ValueError as error:
                refusals.add(origin, str(error))
                continue
            for sample in made:
                if not sample.targets and source.objective.needs_targets():
                    (cut_away if lost else refusals).add(origin, _why_no_target(lost, source.max_length))
                elif not refusals.count:
                    writer.add(sample, origin, lost)
        writer.about |= {"skipped": cut_away.count, "left_out": list(source.data.left_out(split))}
    if cut_away.count > LEAVES_OUT * count:
        refusals.join(cut_away)
    if refusals.count:
        raise refusals.error(count)
    if split == "train" and not count:
        raise UserError.of("split train has no rows to learn from", "check data.path, data.limit and data.holdout")


def _why_no_target(lost: int, max_length: int) -> str:
    if lost:
        return f"nothing is left to learn once its {lost} last tokens are cut off by max_length={max_length}"
    return "has nothing to learn: its answer is empty"


def _foreign_token(samples: Samples, vocabulary: int) -> UserError:
    where = next(i for i in range(len(samples)) if any((s.tokens >= vocabulary).any() for s in samples[i].segments))
    return UserError.of(
        f"the tokenizer gives token {samples.largest_token} (first too large in {samples.origin(where)}), but the "
        f"model has {vocabulary} embeddings: they do not belong together",
        "give model.path a folder whose tokenizer belongs to its weights",
    )


class _Writer:
    """Streams samples into the columns of a folder, and what is to be known about them into `about.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / name).open("wb") for name in _COLUMNS}
        self._names: list[str] | None = None
        self.about: dict[str, Any] = {"cut": 0, "cut_tokens": 0, "skipped": 0, "largest_token": -1}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        sizes = {name: file.tell() for name, file in self._files.items()}
        for file in self._files.values():
            file.close()
        about = self.about | {"bytes": sizes, "sha256": _digests(self._folder), "names": self._names or []}
        (self._folder / "about.json").write_text(json.dumps(about))

    def add(self, sample: Sample, origin: str, lost: int) -> None:
        """Appends a sample. lost: tokens that were cut off."""
        names = list(sample.numbers)
        self._names = names if self._names is None else self._names
        assert names == self._names, "an objective gives every sample the same numbers, in the same order"
        for segment in sample.segments:
            self._put("tokens", segment.tokens)
            self._put("is_target", segment.is_target)
        self._put("segment_lengths", [len(segment.tokens) for segment in sample.segments])
        self._put("parents", [segment.parent for segment in sample.segments])
        self._put("segment_counts", [len(sample.segments)])
        self._put("numbers", list(sample.numbers.values()))
        self._put("origins", np.frombuffer(origin.encode(), np.uint8))
        self._put("origin_lengths", [len(origin.encode())])
        self.about["cut"] += lost > 0
        self.about["cut_tokens"] += lost
        largest = max(int(segment.tokens.max(initial=-1)) for segment in sample.segments)
        self.about["largest_token"] = max(self.about["largest_token"], largest)

    def _put(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=_COLUMNS[name]).tobytes())


def _publish(made: Path, final: Path) -> None:
    """Gives a finished folder its name. Where another process was quicker and its work is whole, ours is dropped."""
    with suppress(OSError):
        made.rename(final)
        return
    if _valid(final) is not None:
        return
    shutil.rmtree(final, ignore_errors=True)
    with suppress(OSError):
        made.rename(final)


def _temporary(cache: Path) -> Path:
    """A new folder of this process alone; those that killed processes left long ago are removed."""
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    folder = cache / f"{_UNFINISHED}{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def _valid(folder: Path) -> Samples | None:
    """The samples of a folder, if there is one and every byte is as it was written."""
    try:
        whole = json.loads((folder / "about.json").read_text())["sha256"] == _digests(folder)
        return Samples(folder) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each column's file."""
    digests = {}
    for name in _COLUMNS:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _open_column(path: Path, kind: str, size: int) -> NDArray[Any]:
    """Maps a column. Raises ValueError where it has not the size that was written."""
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
    if not size:
        return np.zeros(0, np.dtype(kind))  # nothing cannot be mapped
    return np.memmap(path, dtype=np.dtype(kind), mode="r")


def _starts(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of consecutive runs begins, and where the last ends: `(runs + 1,)`."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
