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

from loomtune.contracts import Data, Dropped, Piece, Row
from loomtune.errors import Fault, UserError
from loomtune_plugins.data import limits
from loomtune_plugins.data.faults import Faults
from loomtune_plugins.data.paths import names
from loomtune_plugins.data.reader import Numbered, Reader, Record
from loomtune_plugins.data.split_settings import SplitSettings
from loomtune_plugins.data.text import excerpt, sound
from loomtune_plugins.data.values import RecordError

VERSION = 4
"""Part of the fingerprint: raise it when the same files and settings give other rows."""

QUICK = 20
"""How many records of each file `check` reads."""

BARREN = "give two answers of different rank or score to a prompt, or set a lower data.min_gap"

Chosen = Mapping[str, Any]
"""What was decided by a file's first record, as plain data: the same holds for all of its pieces."""


def undecided(_record: Record, _where: str) -> Chosen:
    """Of files whose columns mean the same whatever the first record is."""
    return {}


class RowMaker(Protocol):
    """What makes rows of records."""

    def of_record(self, record: Record, origin: str) -> tuple[Any, list[dict[str, Any]]]:
        """(content, rows): records of equal content are in the same split. Raises RecordError."""

    def canonical(self, record: Record, origin: str) -> list[dict[str, Any]]:
        """Rows as preparation keeps them: what an objective would make of them is still open. Raises RecordError."""


class Files(Data):
    """Data in files, which a reader knows to read.

    choose: decides, by a file's first record and where that is, what its columns mean; raises UserError where it
        cannot. make: of that decision. faults: what is wrong with its settings. cure: what to do with a record that
        cannot be read at all; barren: where none gives a row. patterns: what the reader finds each split by.
    """

    def __init__(
        self,
        settings: SplitSettings,
        reader: Reader,
        choose: Callable[[Record, str], Chosen],
        make: Callable[[Chosen], RowMaker],
        faults: Iterable[Fault],
        cure: str,
        barren: str = BARREN,
        patterns: Mapping[str, str] | None = None,
    ) -> None:
        self.settings, self._reader, self._choose, self._make = settings, reader, choose, make
        self._faults, self._cure, self._barren = [*limits.faults(settings), *faults], cure, barren
        self._left_out: dict[str, Sequence[str]] = {}
        named = {"train": settings.path, "validation": settings.validation, "test": settings.test}
        self._patterns = named if patterns is None else patterns
        self.window = settings.window if settings.stream else 0

    def check(self) -> None:
        """Raises UserError for settings that contradict each other, missing files, and faults in the first records."""
        self.check_pieces()
        for split, pattern in self._patterns.items():
            for path in self._paths(split) if pattern else ():
                for _ in self._mapped([path], QUICK):
                    pass

    def check_pieces(self) -> None:
        if faults := [*self._faults, *self._contradictions(), *self._absences()]:
            raise UserError(*faults)

    def splits(self) -> tuple[str, ...]:
        """Those with a file; validation too where rows are set aside for it."""
        return tuple(split for split, pattern in self._patterns.items() if pattern or self._is_held_out(split))

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of a split in the order of the files. Raises UserError after the last one where any record is bad."""
        found = self._mapped(self._paths("train" if self._is_held_out(split) else split))
        if split in ("train", "validation") and self._holds_out:
            found = (one for one in found if (_number(one[0]) <= self._threshold) == (split == "validation"))
        return itertools.islice(self._counted(split, found), self.settings.limit or None)

    def pieces(self, split: str) -> Sequence[Piece]:
        """Parts of the files of a split, in their order; a single one where only so many rows are asked for.

        Raises UserError for what is set and does nothing before a run reads the rows, such as rows set aside.
        """
        if self.settings.stream:
            raise UserError.of("data.stream is for a run; preparation streams anyway", "leave out data.stream")
        if self._holds_out:
            raise UserError.of(
                "data.holdout sets rows aside where a run reads them; preparation splits by a stage",
                "leave out data.holdout and data.holdout_rows, and choose a stage that splits, such as stage=[split]",
            )
        found = [piece for path, name in names(self._paths(split)).items() for piece in self._pieces(path, name)]
        return [{"limit": self.settings.limit, "pieces": found}] if self.settings.limit else found

    def read(self, piece: Piece) -> Iterator[Row | Dropped]:
        """Rows as preparation keeps them, and in the place of each record that gives none, why."""
        if "limit" not in piece:
            yield from self._kept(piece)
            return
        left = piece["limit"]
        for one in itertools.chain.from_iterable(map(self._kept, piece["pieces"])):
            if left == 0:
                return
            left -= not isinstance(one, Dropped)
            yield one

    def stream(self, place: Any = None) -> Iterator[tuple[Row | Dropped, Any]]:
        """Training rows, and records that give none for a fault. A place: file, record, row of it, rows up to there.

        Files before the one that it is in are not read again, but of this one the records are.
        """
        file, done, _, total = start = tuple(place or (0, 0, 0, 0))
        count = barren = 0
        for index, (path, name) in list(enumerate(names(self._paths("train")).items()))[file:]:
            maker: RowMaker | None = None
            number = 0
            for number, record in _placed(path, self._reader.stream(path)):
                rows: list[Any] = []
                try:
                    if isinstance(record, RecordError):
                        raise record
                    maker = maker or self._make(self._choose(record, f"{path}:{number}"))
                    if (index, number) < (file, done):
                        continue
                    rows = maker.of_record(record, f"{name}:{number}")[1]
                    count, barren = count + 1, barren + (not rows)
                except RecordError as error:
                    rows = [Dropped(f"{name}:{number}", error.reason, str(error))]
                if barren:
                    told = f"{barren} of {count} records of train, as far as they were read, give no row"
                    self._left_out["train"] = told, self._barren
                for at, row in enumerate(rows, start=1):
                    if total == (self.settings.limit or -1):
                        return
                    if (index, number, at) > start[:3]:
                        total += not isinstance(row, Dropped)
                        yield row, [index, number, at, total]
            if not number:
                raise _empty(path)

    def inputs(self, split: str) -> Mapping[str, str]:
        return {name: self._reader.digest(path) for path, name in names(self._paths(split)).items()}

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
        """Digest of the files' names and contents, of the mapping and of this code's version.

        Of files that stream, the sizes and times of change stand for the contents.
        """
        settings = asdict(self.settings) | dict.fromkeys(("path", "validation", "test"), "")
        digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode())
        for split, pattern in self._patterns.items():
            read = self._reader.stamp if self.window and split == "train" else self._reader.digest
            for path, name in names(self._paths(split)).items() if pattern else ():
                digest.update(f"\n{split}\x1f{name}\x1f{read(path)}".encode())
        return digest.hexdigest()

    def _pieces(self, path: Path, name: str) -> Iterator[Piece]:
        number, chosen = 0, None
        for number, record in _placed(path, self._reader.glimpse(path)):
            if not isinstance(record, RecordError):
                chosen = self._choose(record, f"{path}:{number}")
                break
        if not number:
            raise _empty(path)
        beside = {"path": str(path.absolute()), "name": name, "chosen": chosen}
        yield from ({**beside, "part": part} for part in self._reader.parts(path))

    def _kept(self, piece: Piece) -> Iterator[Row | Dropped]:
        maker = None if piece["chosen"] is None else self._make(piece["chosen"])
        path = Path(piece["path"])
        for number, record in _placed(path, self._reader.records(path, piece["part"])):
            origin = f"{piece['name']}:{number}"
            try:
                if isinstance(record, RecordError):
                    raise record
                assert maker, "where no record could be read there is no choice, and no record to make rows of"
                rows = [sound(row) for row in maker.canonical(record, origin)]
            except RecordError as error:
                yield Dropped(origin, error.reason, str(error), excerpt(record))
                continue
            yield from rows
            if not rows:
                yield Dropped(origin, "gives no row", self._barren.partition(", or set")[0])  # settings are a run's

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
        return self._reader.find(self._patterns[split])

    def _mapped(self, paths: Sequence[Path], most: int | None = None) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Contents and rows of some files' records, at most so many of each; all bad ones are counted before any is
        told."""
        faults, some = Faults(self._cure), most is not None
        read = self._reader.records if most is None else self._reader.glimpse
        for path, name in names(paths).items():
            maker: RowMaker | None = None
            number = 0
            for number, record in itertools.islice(_placed(path, read(path)), most):
                try:
                    if isinstance(record, RecordError):
                        raise record
                    maker = maker or self._make(self._choose(record, f"{path}:{number}"))
                    content, rows = maker.of_record(record, f"{name}:{number}")
                except RecordError as error:
                    faults.add(f"{path}:{number}", error)
                    continue
                some = some or bool(rows)
                if not faults.count:
                    yield content, rows
            if not number:
                raise _empty(path)
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
        if settings.stream and settings.window < 1:
            yield Fault(f"data.window={settings.window} holds no row", "set data.window to 1 or more")
        if not settings.stream and settings.window != SplitSettings.window:
            yield Fault(f"data.window={settings.window} is of a stream", "leave it out, or set data.stream=true")
        if settings.stream and self._holds_out:
            what = "data.stream=true reads training rows as they come, and none can be set aside before"
            yield Fault(what, "name data.validation, and leave out data.holdout and data.holdout_rows")
        if settings.validation and self._holds_out:
            yield Fault(
                "data.validation names a file, and rows are to be set aside for validation too",
                "leave out data.validation, or data.holdout and data.holdout_rows",
            )

    def _absences(self) -> Iterator[Fault]:
        if not self.settings.path:
            yield Fault("data.path is not set", "set data.path to a file of training rows")
        for name, pattern in (("path", self.settings.path), *list(self._patterns.items())[1:]):
            yield from self._reader.absences(name, pattern) if pattern else ()


def _placed(path: Path, found: Iterator[Numbered]) -> Iterator[Numbered]:
    """Has what ends the reading of a file say where that was."""
    number = 0
    try:
        for number, record in found:
            yield number, record
    except UserError as error:
        after = f" (after {path.name}:{number})" if number else " (at its beginning)"
        raise UserError(*(Fault(f"{fault.what}{after}", fault.cure) for fault in error.faults)) from error


def _empty(path: Path) -> UserError:
    return UserError.of(f"{path} has no rows", "give a file with rows, or leave the setting out")


def _number(content: Any) -> int:
    """64 bits of what a record says, the same on every machine; where it was read does not count."""
    said = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")
