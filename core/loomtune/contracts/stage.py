"""Steps of data preparation.

Rows pass through the stages in the order chosen. A stage that judges each row by itself is a `RowStage`; one that has
to know which rows are alike, wherever they are, is a `LinkStage`: it describes rows by a few bytes each, says which of
them are worth comparing and how alike they are, and never sees them together. Whoever prepares data decides where all
of it runs, so a stage keeps nothing between two calls but what its settings and files say: it is built anew in every
process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts.data import Dropped, Row


class Stage(ABC):  # noqa: B024 - what a stage must do is said by its kind
    """One step. Importing it must not import torch; a stage that needs it does so when it is asked about rows.

    aside: settings of which nothing of the outcome depends, such as how long is waited: others make no other job.
    """

    aside: Sequence[str] = ()

    def check(self) -> None:
        """Raises UserError, before anything is read, where settings make no sense or files are missing."""
        return

    def fingerprint(self) -> str:
        """Digest of what the outcome depends on beside the settings: the files that it reads, a model's among them."""
        return ""

    def versions(self) -> Mapping[str, str]:
        """What decides the outcome, with its version: libraries, and the stage's own rules where they changed."""
        return {}

    def memory(self) -> int:
        """Bytes that a process needs for it beside a few megabytes of rows: a model's, an index'."""
        return 0


class RowStage(Stage):
    """Judges or changes each row by itself."""

    @abstractmethod
    def apply(self, rows: Sequence[Row]) -> Sequence[Row | Dropped]:
        """For each of some rows the row, perhaps changed, or why it goes no further.

        Several at a time, for the sake of models; what becomes of a row never hangs on its company. A row that its
        data gave to a split says so by `split`; one without it may yet fall into any. A stage that guards what is held
        out passes over rows of `test` and `validation`: they are what it guards.
        """

    def page(self, row: Row) -> str:
        """What people are shown of a row that stayed, as Markdown, in a file of the stage's own; empty: nothing."""
        return ""


class LinkStage(Stage):
    """Finds rows that are alike: those that are compared, and found alike to at least `threshold`.

    limit: the most rows that it takes, 0 for any; more are refused, before they are compared.
    """

    threshold: float
    limit: int = 0

    @abstractmethod
    def describe(self, rows: Sequence[Row]) -> NDArray[Any]:
        """`(rows, ...)`: what rows are compared by; always of one type (a structured one, perhaps) and shape."""

    def keys(self, described: NDArray[Any]) -> NDArray[Any] | None:
        """`(rows, keys)` uint64: rows that share a key in the same column are compared. None: each row with each."""
        return None

    @abstractmethod
    def alike(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """`(n,)` float32: how alike `n` described rows are to `n` others, one by one; symmetric."""

    def table(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """`(n, m)`: how alike each of `n` is to each of `m`. Asked where there are no keys, with some hundreds."""
        return np.stack([self.alike(np.repeat(row[None], len(other), 0), other) for row in one])


class DuplicateStage(LinkStage):
    """Drops each row that is alike to an earlier one that stays: one of every such pair is left, the first read.

    reason: what is told of dropped rows.
    """

    reason: str


class SplitStage(LinkStage):
    """Puts rows into splits; those that are alike, directly or through others, are never in different ones.

    Rows that the inputs hold out keep their split; rows of none that are alike to one of them are dropped.
    """

    @abstractmethod
    def shares(self) -> Mapping[str, float]:
        """Split to its share of the rows; they add up to 1. Where a group falls is drawn by a digest of its rows."""
