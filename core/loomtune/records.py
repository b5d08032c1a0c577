"""What a frozen role says of every row: computed once under any layout, kept on disk, joined to the samples.

A record of a split lies in a folder beside the samples, named by a digest of all that its numbers depend on, so nothing
stale is ever read. It is written in parts of rows, each committed by itself: a pass that was interrupted goes on with
the parts that are missing, and a part whose digest is wrong counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loomtune.checkpoint.files import replace_bytes
from loomtune.contracts import Record, Role
from loomtune.errors import UserError
from loomtune.reading import read
from loomtune.run import Run

FORMAT = 1
"""Version of the files' layout; part of the key."""

ROWS, NUMBERS = 512, 8192
"""Rows of a part, fewer where each target has many numbers: rows times numbers is at most so much, or 64 rows."""

PATIENCE = 20.0
"""Seconds between two words about how far a pass is."""

DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Column:
    """A record of a split, read where it is touched.

    rows: of the split; size: of a part. A part's file: the sha256 of the rest; where each row begins, and the last one
    ends, `(rows + 1,)` int64, counted in numbers; the numbers, float32.
    """

    folder: Path
    rows: int
    size: int
    width: int

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        """The numbers of a row's targets, `(targets,)` or `(targets, width)`."""
        part, at = divmod(row, self.size)
        values = DIGEST + 8 * (len(self.rows_of(part)) + 1)
        with self.path(part).open("rb") as file:
            first, last = np.frombuffer(os.pread(file.fileno(), 16, DIGEST + 8 * at), "<i8")
            found = np.frombuffer(os.pread(file.fileno(), int(4 * (last - first)), int(values + 4 * first)), "<f4")
        return found.reshape(-1, self.width) if self.width else found

    def rows_of(self, part: int) -> range:
        """Which rows a part holds."""
        return range(part * self.size, min((part + 1) * self.size, self.rows))

    def path(self, part: int) -> Path:
        """Where a part lies."""
        return self.folder / f"{part:06d}"

    def parts(self) -> range:
        """All of them, whether they are there or not."""
        return range(-(-self.rows // self.size))

    def missing(self) -> list[int]:
        """Parts that are not there, or not as they were written."""
        return [part for part in self.parts() if not self._whole(part)]

    def _whole(self, part: int) -> bool:
        try:
            with self.path(part).open("rb") as file:
                meant = file.read(DIGEST)
                return hashlib.file_digest(file, "sha256").digest() == meant
        except OSError:
            return False

    def write(self, part: int, targets: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Commits a part. targets: of each of its rows. values: `(targets, ...)`, row by row."""
        starts = np.concatenate([[0], np.cumsum(targets)]) * max(1, self.width)
        content = starts.astype("<i8").tobytes() + values.astype("<f4").tobytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(self.path(part), hashlib.sha256(content).digest(), content)


def join(
    run: Run,
    name: str,
    record: Record,
    splits: Sequence[str],
    made_of: Sequence[object],
    opened: Callable[[], AbstractContextManager[Role]],
) -> None:
    """Gives the samples of splits what a role says of them; it is opened where some of it has yet to be computed.

    Called on every rank. made_of: plain data that decides what the role is.
    Raises UserError where a rank does not see what rank 0 wrote, Preempted where one was asked to leave; on every rank.
    """
    with ExitStack() as stack:
        roles: dict[str, Role] = {}
        for split in splits:
            column = _column(run, split, name, record, made_of)
            missing = run.world.broadcast(column.missing() if run.world.leads else None)
            if missing and not roles:
                roles[record.role] = stack.enter_context(opened())
            told = 0.0
            for part in missing:
                if time.monotonic() - told > PATIENCE:
                    told, left = time.monotonic(), sum(len(column.rows_of(one)) for one in missing if one >= part)
                    run.tell_once(f"{name}: {left:,} rows of {split} are read once, into {column.folder}")
                targets, values = _read(run, split, record, roles, column.rows_of(part))
                if run.world.leads:
                    column.write(part, targets, values)
            run.world.barrier()
            _check_seen(run, column)
            run.splits[split].columns[name] = column


def _column(run: Run, split: str, name: str, record: Record, made_of: Sequence[object]) -> Column:
    samples = run.splits[split]
    size = min(ROWS, max(64, NUMBERS // max(1, record.width)))
    said = [FORMAT, size, samples.key, name, record.width, record.of, run.settings.precision, *made_of]
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return Column(samples.folder.parent / "records" / key, len(samples), size, record.width)


def _check_seen(run: Run, column: Column) -> None:
    unseen = sum(not column.path(part).is_file() for part in column.parts())
    if run.world.total([float(unseen)])[0]:
        what = f"not every rank sees {column.folder}, where rank 0 keeps what is read once"
        raise UserError.of(what, "every rank must see the folder that LOOMTUNE_CACHE names")


def _read(
    run: Run, split: str, record: Record, roles: Mapping[str, Role], rows: range
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What a role says of some rows, computed by all ranks: the targets of each, and the numbers of all in order."""
    samples = [run.splits[split][row] for row in rows]
    leaving = "asked to leave before the first step; what was read of frozen roles is kept"
    # What packs has not shown yet that its samples do not see each other.
    found = read(run, samples, lambda batch: record.read(roles, batch), rows, packs=False, leaving=leaving)
    return np.array([len(one) for one in found], np.int64), np.concatenate(found)
