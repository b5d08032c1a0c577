"""Several sources in one run, each with a share of the visits."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction

from loomtune.contracts import Data, Dropped, Piece, Row
from loomtune.errors import Fault, UserError
from loomtune_plugins.data.any_files import AnyFiles
from loomtune_plugins.data.any_files_settings import AnyFileSettings
from loomtune_plugins.data.mix_settings import MixSettings, SourceSettings

_KEYS = tuple(field.name for field in fields(AnyFileSettings))


class Mix(Data):
    """Sources one after the other, in the order of their names, which does not depend on how they were typed."""

    mixes = True

    def __init__(self, settings: MixSettings) -> None:
        self.settings = settings
        self.sources = {name: _files(settings.sources[name]) for name in sorted(settings.sources)}

    def check(self) -> None:
        """Raises UserError for shares that contradict each other, and for whatever is wrong with any source."""
        faults = list(_share_faults(self.settings))
        for name, source in self.sources.items():
            if self.settings.sources[name].stream:
                what = f"data.sources.{name}.stream=true: shares are of rows that are there, and what streams is not"
                faults.append(Fault(what, "leave it out, or choose data=files for this source alone"))
            try:
                with _of(name):
                    source.check()
            except UserError as error:
                faults += error.faults
        if faults:
            raise UserError(*faults)

    def splits(self) -> tuple[str, ...]:
        """Those of any source."""
        found = {split for source in self.sources.values() for split in source.splits()}
        return tuple(split for split in ("train", "validation", "test") if split in found)

    def rows(self, split: str) -> Iterator[Row]:
        """Each source's own rows, which say whose they are. Raises UserError where any record is bad."""
        for name, source in self._with(split):
            with _of(name):
                for row in source.rows(split):
                    yield _named(name, row)

    def pieces(self, split: str) -> Sequence[Piece]:
        """Those of each source. Raises UserError for shares, which say nothing before a run reads the rows."""
        if given := [key for keys in _shares(self.settings).values() for key in keys]:
            what = f"{', '.join(given)}: shares belong to a run; preparation keeps all rows"
            raise UserError.of(what, "leave them out, and mix what was prepared")
        found: list[Piece] = []
        for name, source in self._with(split):
            with _of(name):
                found += [{"source": name, "piece": piece} for piece in source.pieces(split)]
        return found

    def read(self, piece: Piece) -> Iterator[Row | Dropped]:
        """A piece's rows, which say whose they are."""
        name = piece["source"]
        for one in self.sources[name].read(piece["piece"]):
            yield one if isinstance(one, Dropped) else _named(name, one)

    def left_out(self, split: str) -> Sequence[str]:
        """What any source left out, and the cures."""
        said = {name: source.left_out(split) for name, source in self._with(split)}
        told = [(f"{name}: {what}", _own(name, cure)) for name, (what, cure) in ((n, s) for n, s in said.items() if s)]
        return tuple("; ".join(dict.fromkeys(parts)) for parts in zip(*told, strict=True))

    def visits(self, rows: Mapping[str, int]) -> Mapping[str, Fraction]:
        """By weight and by temperature, an epoch visits as many rows as there are, whosesoever; else each as often."""
        for name in self.sources:
            if not rows.get(name):
                what = f"source {name} has no rows to learn from"
                raise UserError.of(what, f"check data.sources.{name}.path and .limit, or leave the source out")
        weigh = _weigher(self.settings)
        if weigh is None:
            repeats = {name: _exact(self.settings.sources[name].epochs or 1) for name in rows}
            return {name: count * repeats[name] for name, count in rows.items()}
        try:
            weights = {name: weigh(name, count) for name, count in rows.items()}
        except (OverflowError, ValueError) as error:
            what = f"data.temperature={self.settings.temperature:g}: rows^(1/temperature) is beyond all numbers"
            raise UserError.of(what, "set data.temperature to 0.1, or more") from error
        total = sum(weights.values(), Fraction())
        return {name: sum(rows.values()) * weight / total for name, weight in weights.items()}

    def inputs(self, split: str) -> Mapping[str, str]:
        """Those of each source, by its name and theirs, as `origin` has them."""
        found: dict[str, str] = {}
        for name, source in self._with(split):
            with _of(name):
                found |= {f"{name}/{file}": digest for file, digest in source.inputs(split).items()}
        return found

    def fingerprint(self) -> str:
        """Digest of the sources' names and fingerprints; shares change no row."""
        made_of = [(name, source.fingerprint()) for name, source in self.sources.items()]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def _with(self, split: str) -> Iterator[tuple[str, AnyFiles]]:
        return ((name, source) for name, source in self.sources.items() if split in source.splits())


def _files(settings: SourceSettings) -> AnyFiles:
    return AnyFiles(AnyFileSettings(**{key: getattr(settings, key) for key in _KEYS}))


def _named(name: str, row: Row) -> Row:
    """The row of a source; two of them may have files of one name."""
    return {**row, "source": name, "origin": f"{name}/{row['origin']}"}


def _own(name: str, told: str) -> str:
    """What is told of a source's setting, with the key that it has here."""
    return re.sub(rf"\bdata\.(?=(?:{'|'.join(_KEYS)})\b)", f"data.sources.{name}.", told)


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Has a source's errors say whose they are."""
    try:
        yield
    except UserError as error:
        found = (Fault(_own(name, fault.what), _own(name, fault.cure)) for fault in error.faults)
        raise UserError(*found) from error


def _weigher(settings: MixSettings) -> Callable[[str, int], Fraction] | None:
    """The weight of a source of so many rows; None where each source says itself how often it is visited."""
    temperature = settings.temperature
    if temperature is not None:
        return lambda name, rows: _exact(rows ** (1 / temperature))
    if all(source.weight is None for source in settings.sources.values()):
        return None
    return lambda name, rows: _exact(settings.sources[name].weight or 0)


def _exact(number: float) -> Fraction:
    """A share to nine digits: 0.3 is three tenths, and machines may disagree on a power's last bits."""
    return Fraction(f"{number:.9g}")


def _shares(settings: MixSettings) -> dict[str, dict[str, float]]:
    """What is set, by key: of each kind of share."""
    sources = sorted(settings.sources.items())
    kinds = {
        "weight": {f"data.sources.{name}.weight": source.weight for name, source in sources},
        "epochs": {f"data.sources.{name}.epochs": source.epochs for name, source in sources},
        "temperature": {"data.temperature": settings.temperature},
    }
    return {kind: {key: one for key, one in keys.items() if one is not None} for kind, keys in kinds.items()}


def _share_faults(settings: MixSettings) -> Iterator[Fault]:
    shares, weights = _shares(settings), _shares(settings)["weight"]
    given = {key: value for keys in shares.values() for key, value in keys.items()}
    if not settings.sources:
        yield Fault("data=mix has no sources", "name some: data.sources.NAME.path=FILE, for each a name of your own")
    if sum(map(bool, shares.values())) > 1:
        what = f"shares are said in several ways: {', '.join(given)}"
        yield Fault(what, "leave only weights, only epochs, or the temperature")
    if weights and (lacking := [name for name, one in sorted(settings.sources.items()) if one.weight is None]):
        cure = f"set {' '.join(f'data.sources.{name}.weight=' for name in lacking)} too"
        yield Fault(f"only some sources have a weight: {', '.join(weights)}", cure)
    for key, value in given.items():
        if not 0 < value < math.inf:
            yield Fault(f"{key}={value:g} is no share: nothing would be visited", f"set {key} above 0")
