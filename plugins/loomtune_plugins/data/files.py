"""What every source of files shares: finding them, mapping their records, setting rows aside, and their digest."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from loomtune.contracts import Row
from loomtune.errors import Fault, UserError, near
from loomtune_plugins.data.columns import FORMATS, Columns, RecordError, learned
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.paths import absence, content_digest, find

VERSION = 1
"""Part of the fingerprint: raise it when the same files and settings give other rows."""

SHOWN = 5
"""How many faults are told one by one."""

QUICK = 20
"""How many records of each file `check` reads."""

Record = Mapping[str, Any]
Reader = Callable[[Path], Iterator[tuple[int, Record | RecordError]]]
"""Gives a file's records, numbered from 1, or in their place what is wrong with them. Raises UserError where the whole
file cannot be read."""


class Files:
    """The splits of one source. cure: what to do with a record that cannot be read at all."""

    def __init__(self, settings: FileSettings, read: Reader, cure: str) -> None:
        self.settings, self._read, self._cure = settings, read, cure
        self._patterns = {"train": settings.path, "validation": settings.validation, "test": settings.test}

    def check(self) -> None:
        """Raises UserError for settings that contradict each other, missing files, and faults in the first records."""
        faults = [*self._contradictions(), *self._absences()]
        if faults:
            raise UserError(*faults)
        for split, pattern in self._patterns.items():
            for path in self._paths(split) if pattern else ():
                for _ in self._mapped([path], QUICK):
                    pass

    def splits(self) -> tuple[str, ...]:
        """Those with a file; validation too where rows are set aside for it."""
        return tuple(split for split, pattern in self._patterns.items() if pattern or self._is_held_out(split))

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of a split in the order of the files. Raises UserError after the last one where any record is bad."""
        rows: Iterable[Row] = self._mapped(self._paths("train" if self._is_held_out(split) else split))
        if split in ("train", "validation") and self._holds_out:
            rows = (row for row in rows if (_number(row) <= self._threshold) == (split == "validation"))
        return itertools.islice(rows, self.settings.limit or None)

    def fingerprint(self) -> str:
        """Digest of the files' names and contents, of the mapping and of this code's version."""
        settings = asdict(self.settings) | dict.fromkeys(("path", "validation", "test"), "")
        digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode())
        for split, pattern in self._patterns.items():
            for path in self._paths(split) if pattern else ():
                digest.update(f"\n{split}\x1f{path.name}\x1f{content_digest(path)}".encode())
        return digest.hexdigest()

    @property
    def _holds_out(self) -> bool:
        return bool(self.settings.holdout or self.settings.holdout_rows)

    def _is_held_out(self, split: str) -> bool:
        return split == "validation" and self._holds_out

    @cached_property
    def _threshold(self) -> int:
        """Rows whose number is at most this are validation's. Equal rows have equal numbers and stay together."""
        if self.settings.holdout:
            return int(self.settings.holdout * 2**64) - 1
        numbers = {_number(row) for row in self._mapped(self._paths("train"))}
        if self.settings.holdout_rows >= len(numbers):
            raise UserError.of(
                f"data.holdout_rows={self.settings.holdout_rows} leaves none of the {len(numbers)} different rows",
                "set a smaller data.holdout_rows",
            )
        return heapq.nsmallest(self.settings.holdout_rows, numbers)[-1]

    def _paths(self, split: str) -> list[Path]:
        return find(self._patterns[split])

    def _mapped(self, paths: Iterable[Path], most: int | None = None) -> Iterator[Row]:
        """Rows of some files, at most so many records of each; bad records are all counted before any is told."""
        faults = _Faults(self._cure)
        for path in paths:
            columns: Columns | None = None
            number = 0
            for number, record in itertools.islice(self._read(path), most):
                origin = f"{path.name}:{number}"
                try:
                    if isinstance(record, RecordError):
                        raise record
                    columns = columns or Columns.of(self.settings, record, f"{path}:{number}")
                    row = columns.row(record, origin)
                except RecordError as error:
                    faults.add(f"{path}:{number}: {error}")
                    continue
                if not faults.count:
                    yield row
            if not number:
                raise UserError.of(f"{path} has no rows", "give a file with rows, or leave the setting out")
        faults.tell()

    def _contradictions(self) -> Iterator[Fault]:
        settings = self.settings
        if settings.format not in ("auto", *FORMATS):
            known = ("auto", *FORMATS)
            yield Fault(
                f"data.format={settings.format} is not known.{near(settings.format, known)}",
                f"set data.format to one of {', '.join(known)}",
            )
        if not 0 <= settings.holdout < 1:
            yield Fault(f"data.holdout={settings.holdout} is no share of rows", "set 0 <= data.holdout < 1")
        for name in ("holdout_rows", "limit"):
            if getattr(settings, name) < 0:
                yield Fault(f"data.{name}={getattr(settings, name)} is negative", f"set data.{name} to 0 or more")
        if settings.holdout and settings.holdout_rows:
            yield Fault("data.holdout and data.holdout_rows both say what is set aside", "set only one of them")
        if settings.validation and self._holds_out:
            yield Fault(
                "data.validation names a file, and rows are to be set aside for validation too",
                "leave out data.validation, or data.holdout and data.holdout_rows",
            )

    def _absences(self) -> Iterator[Fault]:
        if not self.settings.path:
            yield Fault("data.path is not set", "set data.path to a file of training rows")
        for name, pattern in (("path", self.settings.path), *list(self._patterns.items())[1:]):
            if pattern and not find(pattern):
                yield absence(name, Path(pattern).expanduser())


class _Faults:
    """Counts bad records and remembers the first of them."""

    def __init__(self, cure: str) -> None:
        self.count, self._shown, self._cure = 0, list[str](), cure

    def add(self, what: str) -> None:
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(what)

    def tell(self) -> None:
        """Raises UserError if there was any."""
        if self.count:
            rows = "1 row" if self.count == 1 else f"{self.count} rows"
            more = f"\n  and {self.count - SHOWN} more" if self.count > SHOWN else ""
            listed = "".join(f"\n  {what}" for what in self._shown)
            raise UserError.of(f"{rows} cannot be read:{listed}{more}", self._cure)


def _number(row: Row) -> int:
    """64 bits of what a row says, the same on every machine; where it was read does not count."""
    content = json.dumps(learned(row), sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
