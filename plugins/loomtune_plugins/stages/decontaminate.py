"""Rows that hold what a model will be evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Dropped, Row, RowStage
from loomtune.contracts.data import sides
from loomtune.errors import UserError
from loomtune_plugins.stages import evaluations
from loomtune_plugins.stages.said import asked
from loomtune_plugins.stages.settings import DecontaminateSettings
from loomtune_plugins.stages.shingles import Numbers, hashed_runs, words, words_of


class Index(NamedTuple):
    """N-grams of all evaluation texts.

    grams: sorted; one occurs once for each text that has it. texts: which that is. sizes: lengths of n-grams that
    occur, in words. counts: n-grams that each text has. places: `file:row` of each text.
    """

    grams: Numbers
    texts: NDArray[np.uint32]
    sizes: tuple[int, ...]
    counts: NDArray[np.int64]
    places: Sequence[str]


class Decontaminate(RowStage):
    """Drops rows that share a run of words with a text of an evaluation, in what was asked or in an answer.

    Each text of a record counts by itself, so that its question alone gives a row away. Capitals and punctuation do not
    count. The default of 13 words is that of GPT-3 (Brown et al., 2020, appendix C); what many texts share is left out
    there too. Rows that are given to `validation` or `test` are passed over: nothing is learned from them.
    """

    def __init__(self, settings: DecontaminateSettings) -> None:
        _check(settings)
        self._settings = settings

    def check(self) -> None:
        if not self._settings.against:
            raise UserError.of(f"{evaluations.KEY} names no evaluation", f"set {evaluations.KEY}=[test.jsonl]")
        if not len(self._index.grams):
            raise UserError.of(f"{', '.join(self._settings.against)}: there is no text in it", "name other files")

    def fingerprint(self) -> str:
        return evaluations.digest(self._files)

    def memory(self) -> int:
        return sum(part.nbytes for part in (self._index.grams, self._index.texts, self._index.counts))

    def apply(self, rows: Sequence[Row]) -> Sequence[Row | Dropped]:
        return [self._judged(row) for row in rows]

    def _judged(self, row: Row) -> Row | Dropped:
        if row.get("split") in ("validation", "test"):
            return row
        found = (detail for text in sides(row) if (detail := self._shared(text)))
        if detail := next(found, "") or self._same(asked(row)):
            return Dropped(str(row.get("origin", "")), "part of an evaluation", detail, row)
        return row

    def _shared(self, text: str) -> str:
        """Which evaluation a text holds a part of, and which part; empty: none."""
        numbers, index = words_of(text), self._index
        met: list[NDArray[np.uint32]] = []
        shown = ""
        for size in index.sizes:
            if self._anywhere(size) and size <= len(numbers):
                grams = hashed_runs(numbers, size)
                places, texts = _found(index, grams)
                shown = shown or (" ".join(words(text)[places[0] : places[0] + size]) if len(places) else "")
                met.append(texts)
        whose = self._owner(np.concatenate(met)) if shown else None
        return "" if whose is None else f"{index.places[whose]}: {shown}"

    def _same(self, prompt: str) -> str:
        """Which evaluation text, too short to be looked for within others, a prompt is."""
        if not (whole := [size for size in self._index.sizes if not self._anywhere(size)]):
            return ""
        numbers = words_of(prompt)
        if len(numbers) not in whole:
            return ""
        _, texts = _found(self._index, hashed_runs(numbers, len(numbers)))
        return f"{self._index.places[texts[0]]}: the whole prompt" if len(texts) else ""

    def _anywhere(self, size: int) -> bool:
        """Whether n-grams of so many words are looked for within texts."""
        return size == self._settings.size or size >= self._settings.shortest

    def _owner(self, texts: NDArray[np.uint32]) -> int | None:
        """The evaluation text that is shared to the largest part, if that is enough. texts: one for each n-gram."""
        met, counts = np.unique(texts, return_counts=True)
        shares = counts / self._index.counts[met]
        best = int(shares.argmax())
        return int(met[best]) if shares[best] >= self._settings.share else None

    @cached_property
    def _files(self) -> Sequence[Path]:
        return evaluations.found(self._settings.against)

    @cached_property
    def _index(self) -> Index:
        grams, owners, places, sizes = [], [], list[str](), set[int]()
        for place, numbers in self._texts():
            sizes.add(min(len(numbers), self._settings.size))
            grams.append(np.unique(hashed_runs(numbers, min(len(numbers), self._settings.size))))
            owners.append(np.full(len(grams[-1]), len(places), np.uint32))
            places.append(place)
        flat = np.concatenate([np.zeros(0, np.uint64), *grams])
        whose = np.concatenate([np.zeros(0, np.uint32), *owners])
        order = np.lexsort((whose, flat))
        flat, whose = _uncommon(flat[order], whose[order], self._settings.common)
        return Index(flat, whose, tuple(sorted(sizes)), np.bincount(whose, minlength=len(places)), places)

    def _texts(self) -> Iterator[tuple[str, Numbers]]:
        """`file:row` and the words of each text; of equal ones the first."""
        seen = set[bytes]()
        for path in self._files:
            for number, text in evaluations.texts(path, self._settings.columns):
                numbers = words_of(text)
                digest = blake2b(numbers.tobytes(), digest_size=16).digest()
                if len(numbers) and digest not in seen:
                    seen.add(digest)
                    yield f"{path.name}:{number}", numbers


def _found(index: Index, grams: Numbers) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """(which of a text's n-grams are in the index, the evaluation texts of all different ones among these)."""
    here = np.flatnonzero(index.grams[np.minimum(np.searchsorted(index.grams, grams), len(index.grams) - 1)] == grams)
    met = np.unique(grams[here])
    left, right = np.searchsorted(index.grams, met), np.searchsorted(index.grams, met, side="right")
    texts = [index.texts[start:end] for start, end in zip(left, right, strict=True)]
    return here, np.concatenate([np.zeros(0, np.uint32), *texts])


def _uncommon(grams: Numbers, texts: NDArray[np.uint32], most: int) -> tuple[Numbers, NDArray[np.uint32]]:
    """Without n-grams of more than so many texts. grams: sorted."""
    _, counts = np.unique(grams, return_counts=True)
    kept = np.repeat(counts <= most, counts) if most else np.ones(len(grams), bool)
    return grams[kept], texts[kept]


def _check(settings: DecontaminateSettings) -> None:
    if settings.size < 1 or settings.shortest < 1:
        what = f"stage.decontaminate.size={settings.size}, shortest={settings.shortest}: words are counted from 1"
        raise UserError.of(what, "set stage.decontaminate.size=13 and stage.decontaminate.shortest=8")
    if settings.shortest > max(settings.size, DecontaminateSettings().shortest):
        what = f"stage.decontaminate.shortest={settings.shortest} is more than stage.decontaminate.size={settings.size}"
        raise UserError.of(what, f"set stage.decontaminate.shortest to {settings.size} at most: no more can be asked")
    if not 0 <= settings.share <= 1:
        what = f"stage.decontaminate.share={settings.share} is no share"
        raise UserError.of(what, "set stage.decontaminate.share between 0 and 1")
    if settings.common < 0:
        what = f"stage.decontaminate.common={settings.common} is negative"
        raise UserError.of(what, "set stage.decontaminate.common=10, or 0 to leave nothing out")
