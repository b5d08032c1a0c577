"""Rows that mean the same in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import DuplicateStage, Row
from loomtune.errors import UserError
from loomtune_plugins.stages import embedding
from loomtune_plugins.stages.said import answers, asked, beside, fixed
from loomtune_plugins.stages.settings import SemanticSettings

DEFAULT = 0.9

CHUNK = 1024
"""Rows whose texts are embedded together: what is of like length stands in one batch."""

SIDES = 3
"""Of a row: what was asked, the first answer, and the others."""


class Semantic(DuplicateStage):
    """Drops rows whose prompt and whose answer mean what an earlier row's do, by the cosine of a model's vectors.

    Both sides by themselves, so that one question with another answer stays, and so does a pair with its sides swapped.
    Each row is compared with each: nothing above the threshold is missed.
    """

    reason = "semantic duplicate"

    def __init__(self, settings: SemanticSettings) -> None:
        _check(settings)
        self.threshold, self.limit = settings.threshold or DEFAULT, settings.limit
        self._settings = settings

    def check(self) -> None:
        if not self._settings.model:
            cure = "set stage.semantic.model to the folder of an embedding model, or leave the stage out"
            raise UserError.of("stage.semantic.model names no model", cure)
        embedding.check(folder := Path(self._settings.model))
        if self._settings.threshold is None and not embedding.modules(folder):
            what = f"{folder} was not made to compare sentences: unrelated texts may have cosines above {DEFAULT} there"
            raise UserError.of(what, "set stage.semantic.threshold=0.99, and look at what it drops")

    def fingerprint(self) -> str:
        return embedding.digest(Path(self._settings.model))

    def versions(self) -> Mapping[str, str]:
        """The libraries, and how many tokens of a side are looked at."""
        ours = ["sentence-transformers"] if embedding.modules(Path(self._settings.model)) else []
        libraries = {name: version(name) for name in ("torch", "transformers", *ours)}
        return {**libraries, "tokens read": str(embedding.reads(self._settings))}

    def memory(self) -> int:
        """torch, the weights in fp32, what a batch needs on its way through the model, and vectors of 50,000 rows."""
        folder = Path(self._settings.model)
        return (500 << 20) + 3 * embedding.weight(folder) + 50_000 * SIDES * 4 * embedding.width(folder)

    def describe(self, rows: Sequence[Row]) -> NDArray[Any]:
        """For each row a digest of what must be equal, which sides there are, and a vector of length 1 for each."""
        described = np.zeros(len(rows), self._type)
        for start in range(0, len(rows), CHUNK):
            self._fill(described[start : start + CHUNK], rows[start : start + CHUNK])
        return described

    def _fill(self, described: NDArray[Any], rows: Sequence[Row]) -> None:
        described["fixed"] = [fixed(row, beside(row, self._settings.columns, "stage.semantic.columns")) for row in rows]
        replies = [answers(row) for row in rows]
        sides = [(asked(row), reply[0], "\n".join(reply[1:])) for row, reply in zip(rows, replies, strict=True)]
        texts = sorted({text for side in sides for text in side if text.strip()})
        vectors = dict(zip(texts, self._embedder.vectors(texts), strict=True)) if texts else {}
        for place, side in enumerate(sides):
            for number, text in enumerate(side):
                if text in vectors:
                    described["filled"][place, number] = True
                    described["vectors"][place, number] = vectors[text]

    def alike(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """The least cosine of the sides; 0 where something differs that must not."""
        cosines = np.einsum("nsd,nsd->sn", one["vectors"], other["vectors"])
        turned = np.einsum("nd,nd->n", _leaning(one), _leaning(other)) < 0
        return _least(one, other, cosines, turned)

    def table(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """The same of each with each, by one product of matrices a side."""
        both = zip(one["vectors"].swapaxes(0, 1), other["vectors"].swapaxes(0, 1), strict=True)
        cosines = np.stack([mine @ theirs.T for mine, theirs in both])
        return _least(one[:, None], other[None], cosines, _leaning(one) @ _leaning(other).T < 0)

    @cached_property
    def _embedder(self) -> embedding.Embedder:
        return embedding.opened(self._settings)

    @cached_property
    def _type(self) -> np.dtype[Any]:
        width = self._embedder.vectors(["a"]).shape[1]
        return np.dtype([("fixed", "<u8"), ("filled", "u1", (SIDES,)), ("vectors", "<f4", (SIDES, width))])


def _leaning(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Where from the other answers to the first a row points; nowhere, where there are none."""
    vectors = rows["vectors"]
    return np.asarray((vectors[:, 1] - vectors[:, 2]) * rows["filled"][:, 2:], np.float32)


def _least(one: NDArray[Any], other: NDArray[Any], cosines: NDArray[Any], turned: NDArray[Any]) -> NDArray[np.float32]:
    """cosines: `(sides, ...)`; empty sides do not count. turned: where the better answer is the other's worse."""
    same = (one["fixed"] == other["fixed"]) & (one["filled"] == other["filled"]).all(axis=-1) & ~turned
    empty = np.moveaxis(np.broadcast_to(one["filled"] == 0, (*same.shape, SIDES)), -1, 0)
    return np.where(same, np.where(empty, 1, cosines).min(axis=0), 0).astype(np.float32)


def _check(settings: SemanticSettings) -> None:
    if settings.threshold is not None and not 0 < settings.threshold <= 1:
        what = f"stage.semantic.threshold={settings.threshold} does not lie between 0 and 1"
        raise UserError.of(what, "set stage.semantic.threshold=0.9")
    for key, least in (("batch", 1), ("limit", 1), ("max_length", 0)):
        if (value := getattr(settings, key)) < least:
            raise UserError.of(f"stage.semantic.{key}={value} is less than {least}", f"set stage.semantic.{key} higher")
