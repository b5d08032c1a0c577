"""What every source of files shares: finding them, mapping their records, setting rows aside, and their digest."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from loomtune.contracts import Data, Row
from loomtune.errors import Fault, UserError
from loomtune_plugins.data.paths import absence, content_digest, find
from loomtune_plugins.data.split_settings import SplitSettings
from loomtune_plugins.data.values import RecordError

VERSION = 3
"""Part of the fingerprint: raise it when the same files and settings give other rows."""

SHOWN = 5
"""How many faults are told one by one."""

QUICK = 20
"""How many records of each file `check` reads."""

BARREN = "give two answers of different rank or score to a prompt, or set a lower data.min_gap"

Record = Mapping[str, Any]
Reader = Callable[[Path], Iterator[tuple[int, Record | RecordError]]]
"""Gives a file's records, numbered from 1, or in their place what is wrong with them. Raises UserError where the whole
file cannot be read."""


class RowMaker(Protocol):
    """What makes rows of records."""

    def of_record(self, record: Record, origin: str) -> tuple[Any, list[dict[str, Any]]]:
        """(content, rows): records of equal content are in the same split. Raises RecordError."""


class Files(Data):
    """Data in files, one kind of which a subclass reads.

    begin: makes the mapping of a file, given its first record and where that is; raises UserError where it cannot.
    faults: what is wrong with its settings. cure: what to do with a record that cannot be read at all; barren:
        where none gives a row.
    """

    def __init__(
        self,
        settings: SplitSettings,
        read: Reader,
        begin: Callable[[Record, str], RowMaker],
        faults: Iterable[Fault],
        cure: str,
        barren: str = BARREN,
    ) -> None:
        self.settings, self._read, self._begin, self._cure, self._barren = settings, read, begin, cure, barren
        self._faults = list(faults)
        self._left_out: dict[str, Sequence[str]] = {}
        self._patterns = {"train": settings.path, "validation": settings.validation, "test": settings.test}

    def check(self) -> None:
        """Raises UserError for settings that contradict each other, missing files, and faults in the first records."""
        faults = [*self._faults, *self._contradictions(), *self._absences()]
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
        found = self._mapped(self._paths("train" if self._is_held_out(split) else split))
        if split in ("train", "validation") and self._holds_out:
            found = (one for one in found if (_number(one[0]) <= self._threshold) == (split == "validation"))
        return itertools.islice(self._counted(split, found), self.settings.limit or None)

    def left_out(self, split: str) -> Sequence[str]:
        """How many of a split's records gave no row when it was last read, and what to do about it."""
        return self._left_out.get(split, ())

    def _counted(self, split: str, found: Iterable[tuple[Any, list[dict[str, Any]]]]) -> Iterator[Row]:
        """The rows, and beside them what gives none, which is known after each record: there may be a limit."""
        barren = 0
        self._left_out.pop(split, None)
        for count, (_, rows) in enumerate(found, start=1):
            barren += not rows
            if barren:
                self._left_out[split] = f"{barren} of {count} records of {split} give no row", self._barren
            yield from rows

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
        """Rows whose number is at most this are validation's. Equal contents have equal numbers and stay together."""
        if self.settings.holdout:
            return int(self.settings.holdout * 2**64) - 1
        numbers = {_number(content) for content, rows in self._mapped(self._paths("train")) if rows}
        if self.settings.holdout_rows >= len(numbers):
            raise UserError.of(
                f"data.holdout_rows={self.settings.holdout_rows} leaves none of the {len(numbers)} different rows",
                "set a smaller data.holdout_rows",
            )
        return heapq.nsmallest(self.settings.holdout_rows, numbers)[-1]

    def _paths(self, split: str) -> list[Path]:
        return find(self._patterns[split])

    def _mapped(self, paths: Sequence[Path], most: int | None = None) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Contents and rows of some files' records, at most so many of each; all bad ones are counted before any is
        told."""
        faults, some = _Faults(self._cure), most is not None
        for path in paths:
            maker: RowMaker | None = None
            number = 0
            for number, record in itertools.islice(self._read(path), most):
                try:
                    if isinstance(record, RecordError):
                        raise record
                    maker = maker or self._begin(record, f"{path}:{number}")
                    content, rows = maker.of_record(record, f"{path.name}:{number}")
                except RecordError as error:
                    faults.add(f"{path}:{number}: {error}")
                    continue
                some = some or bool(rows)
                if not faults.count:
                    yield content, rows
            if not number:
                raise UserError.of(f"{path} has no rows", "give a file with rows, or leave the setting out")
        faults.tell()
        if not some:
            told = ", ".join(map(str, paths))
            raise UserError.of(f"no record of {told} gives a row", self._barren)

    def _contradictions(self) -> Iterator[Fault]:
        settings = self.settings
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


def _number(content: Any) -> int:
    """64 bits of what a record says, the same on every machine; where it was read does not count."""
    said = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")
