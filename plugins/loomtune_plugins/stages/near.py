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
from loomtune_plugins.stages.said import answers, asked, fixed
from loomtune_plugins.stages.settings import NearSettings
from loomtune_plugins.stages.shingles import Numbers, characters_of, mixed, runs, words_of


class Near(DuplicateStage):
    """Drops rows whose prompt and whose answer are both nearly an earlier row's, by MinHash and bands.

    Labels, ranks, scores, tools and system prompts must be equal. Where a row has several answers, what is the same in
    all of them counts for no more than half, so that a pair with its sides swapped is another row.
    """

    reason = "near duplicate"

    def __init__(self, settings: NearSettings) -> None:
        _check(settings)
        self.threshold = settings.threshold
        self._size, self._hashes = settings.size, settings.hashes
        self._parted = characters_of if settings.shingle == "characters" else words_of
        self._bands = minhash.banded(settings.threshold, settings.hashes, settings.recall, "stage.near")
        sides = [("filled", "u1", (2,)), ("signature", "u1", (2, settings.hashes))]
        self._type = np.dtype([("fixed", "<u8"), *sides])

    def versions(self) -> Mapping[str, str]:
        return minhash.versions()

    def describe(self, rows: Sequence[Row]) -> NDArray[Any]:
        """For each row a digest of what must be equal, and of both sides a signature and whether there is anything."""
        described = np.zeros(len(rows), self._type)
        described["fixed"] = [fixed(row) for row in rows]
        replies = [answers(row) for row in rows]
        for side, texts in enumerate(([asked(row) for row in rows], [reply[0] for reply in replies])):
            made, filled = minhash.signatures(texts, self._parted, self._size, self._hashes)
            described["signature"][:, side], described["filled"][:, side] = made, filled
        for place, reply in enumerate(replies):
            if len(reply) > 1:
                rivals = contrast([self._shingles(text) for text in reply])
                described["filled"][place, 1] = len(rivals) > 0
                described["signature"][place, 1] = minhash.signature(rivals, self._hashes)
        return described

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
        return np.where(same, both.min(axis=1), 0).astype(np.float32)

    def _shingles(self, text: str) -> Numbers:
        return next(runs([text], self._parted, self._size))[0]


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
    if settings.size < 1 or settings.hashes < 1:
        raise UserError.of("stage.near.size and stage.near.hashes count from 1", "set stage.near.size=5")
    if not 0 < settings.recall < 1:
        what = f"stage.near.recall={settings.recall} does not lie between 0 and 1"
        raise UserError.of(what, "set stage.near.recall=0.99")
