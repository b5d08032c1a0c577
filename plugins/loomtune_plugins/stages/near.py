"""Rows that are nearly the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import DuplicateStage, Row
from loomtune.errors import UserError
from loomtune_plugins.stages import minhash
from loomtune_plugins.stages.said import answers, asked, beside, fixed, numbers
from loomtune_plugins.stages.settings import NearSettings
from loomtune_plugins.stages.shingles import Numbers, characters_of, folded, laid, mixed, runs, words, words_of


class Near(DuplicateStage):
    """Drops rows whose prompt and whose answer are both nearly an earlier row's, by MinHash and bands.

    Labels, ranks, scores, tools, system prompts and numbers must be equal. Where a row has several answers, what is
    the same in all of them counts for no more than half, so that a pair with its sides swapped is another row. Long
    instructions make prompts alike that ask for different things, so the length of what differs is bounded too, and an
    answer too short to be anybody's own leaves no room for another prompt. Capitals and blanks of prompts do not count;
    answers are compared as they are laid out.
    """

    reason = "near duplicate"

    def __init__(self, settings: NearSettings) -> None:
        _check(settings)
        self.threshold = settings.threshold
        self._settings, self._size, self._hashes = settings, settings.size, settings.hashes
        self._parted = (_asked, _answered) if settings.shingle == "characters" else (words_of, words_of)
        self._bands = minhash.banded(settings.threshold, settings.hashes, settings.recall, "stage.near")
        sides = [("filled", "u1", (2,)), ("size", "<u4", (2,)), ("signature", "u1", (2, settings.hashes))]
        self._type = np.dtype([("fixed", "<u8"), *sides])

    def versions(self) -> Mapping[str, str]:
        return minhash.versions()

    def describe(self, rows: Sequence[Row]) -> NDArray[Any]:
        """For each row a digest of what must be equal; of both sides a signature, whether and how much there is.

        How much is 0 for plain text, of which any amount may differ.
        """
        described = np.zeros(len(rows), self._type)
        prompts, replies = [asked(row) for row in rows], [answers(row) for row in rows]
        described["fixed"] = [self._fixed(*one) for one in zip(rows, prompts, replies, strict=True)]
        for side, texts in enumerate((prompts, [reply[0] for reply in replies])):
            made, sizes = minhash.signatures(texts, self._parted[side], self._size, self._hashes)
            described["signature"][:, side], described["size"][:, side] = made, sizes
        for place, reply in enumerate(replies):
            if len(reply) > 1:
                rivals = contrast([self._shingles(text) for text in reply])
                described["size"][place, 1] = len(rivals)
                described["signature"][place, 1] = minhash.signature(rivals, self._hashes)
        described["filled"] = described["size"] > 0
        described["size"][["text" in row for row in rows]] = 0
        return described

    def _fixed(self, row: Row, prompt: str, replies: Sequence[str]) -> int:
        settings = self._settings
        told = [] if settings.numbers else [numbers(prompt), *map(numbers, replies)]
        chance = 0 < max(map(len, replies)) < settings.short
        return fixed(
            row,
            told if any(told) else [],
            words(prompt) if chance else [],
            beside(row, settings.columns, "stage.near.columns"),
        )

    def keys(self, described: NDArray[Any]) -> NDArray[Any]:
        """Bands of both sides by turns, or of the one that is filled: as many pairs are found either way."""
        filled, values = described["filled"].astype(bool), described["signature"]
        turns, both = np.arange(self._hashes) % 2 == 1, filled[:, 0] & filled[:, 1]
        answer = np.where(both[:, None], turns, filled[:, 1:])
        salt = mixed(described["fixed"] + filled @ np.array([1, 2], np.uint64))
        return minhash.keys(np.where(answer, values[:, 1], values[:, 0]), salt, *self._bands)

    def alike(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """The smaller of both sides' estimated Jaccard similarities; 0 where something differs that must not."""
        same = (one["fixed"] == other["fixed"]) & (one["filled"] == other["filled"]).all(axis=1)
        both = np.where(one["filled"] == 0, 1, minhash.similarity(one["signature"], other["signature"]))
        if self._settings.differ:
            same &= (apart(both, one["size"], other["size"]) <= self._settings.differ).all(axis=1)
        return np.where(same, both.min(axis=1), 0).astype(np.float32)

    def _shingles(self, text: str) -> Numbers:
        return next(runs([text], self._parted[1], self._size))[0]


def apart(alike: NDArray[Any], one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """How many shingles only one of two sets has, by their Jaccard similarity and sizes: of a union, 1 - J is apart.

    By 256 values it is wrong by sqrt(apart * union / 256) on average: by 8 of 60 where the union is 300, by 31 where it
    is 4,000.
    """
    together = (one.astype(np.float64) + other) / (1 + alike)
    return np.asarray((1 - alike) * together, np.float64)


def _asked(text: str) -> Numbers:
    return characters_of(text, lambda said: folded(said, "NFC"))


def _answered(text: str) -> Numbers:
    return characters_of(text, laid)


def contrast(rivals: Sequence[Numbers]) -> Numbers:
    """Shingles of several answers as one set: those that all share, and the others with their answer's number.

    The others stand in copies, the last of them in part, until they weigh as much as what is shared: of a pair and the
    same one swapped, a third at most is equal.
    """
    shared = reduce(np.intersect1d, rivals)
    others = [mixed(np.setdiff1d(one, shared) + np.uint64(place + 1)) for place, one in enumerate(rivals)]
    apart = np.concatenate(others)
    weight = max(1.0, len(shared) / max(1, len(apart)))
    copies = np.arange(int(np.ceil(weight)), dtype=np.uint64)
    grown = mixed(apart + copies[:, None] * np.uint64(0x9E3779B97F4A7C15))
    begun = (mixed(grown) >> np.uint64(11)) / 2**53 + copies[:, None]
    return np.concatenate([shared, grown[(begun < weight) | (copies[:, None] == 0)]])


def _check(settings: NearSettings) -> None:
    if not 0.5 <= settings.threshold <= 1:
        what = f"stage.near.threshold={settings.threshold} does not lie between 0.5 and 1"
        raise UserError.of(what, "set stage.near.threshold=0.75")
    if settings.shingle not in ("characters", "words"):
        what = f"stage.near.shingle={settings.shingle} is unknown"
        raise UserError.of(what, "set stage.near.shingle=characters or stage.near.shingle=words")
    inert = [key for key in ("recall", "differ") if getattr(settings, key) != getattr(NearSettings(), key)]
    if settings.threshold == 1 and inert:
        what = f"stage.near.{inert[0]}={getattr(settings, inert[0])} changes nothing where stage.near.threshold=1"
        raise UserError.of(what, f"leave stage.near.{inert[0]} out")
    if settings.size < 1 or settings.hashes < 1:
        raise UserError.of("stage.near.size and stage.near.hashes count from 1", "set stage.near.size=5")
    for key in ("differ", "short"):
        if (value := getattr(settings, key)) < 0:
            raise UserError.of(f"stage.near.{key}={value} is negative", f"set stage.near.{key} to 0 or more")
    if not 0 < settings.recall < 1:
        what = f"stage.near.recall={settings.recall} does not lie between 0 and 1"
        raise UserError.of(what, "set stage.near.recall=0.99")
