"""Rows that are the same."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import DuplicateStage, Row
from loomtune.contracts.data import identity, retold
from loomtune_plugins.stages.said import beside, fixed
from loomtune_plugins.stages.settings import ExactSettings


class Exact(DuplicateStage):
    """Drops rows of which everything that is learned is equal to an earlier row's: 16 bytes of BLAKE2b say so."""

    threshold = 1.0
    reason = "exact duplicate"

    def __init__(self, settings: ExactSettings) -> None:
        self._blanks, self._case, self._columns = settings.blanks, settings.case, settings.columns

    def describe(self, rows: Sequence[Row]) -> NDArray[Any]:
        """`(rows, 2)` uint64."""
        digests = b"".join(blake2b(self._learned(row), digest_size=16).digest() for row in rows)
        return np.frombuffer(digests, "<u8").reshape(-1, 2)

    def keys(self, described: NDArray[Any]) -> NDArray[Any]:
        return described[:, :1]

    def alike(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((one == other).all(axis=1), np.float32)

    def _learned(self, row: Row) -> bytes:
        values = beside(row, self._columns, "stage.exact.columns")
        return identity(self._plain(row)) + (fixed({}, values).to_bytes(8) if values else b"")

    def _plain(self, row: Row) -> Row:
        return row if self._blanks and self._case else retold(row, self._folded)

    def _folded(self, text: str) -> str:
        text = text if self._blanks else " ".join(text.split())
        return text if self._case else text.casefold()
