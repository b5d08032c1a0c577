"""Where rows come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""One example, in one schema whatever the file was:

- `{"prompt": str, "completion": str}`; only the completion is learned;
- `{"messages": [{"role": ..., "content": ...}, ...]}`; only the assistant's turns are learned;
- `{"text": str}`; every token is learned;
- `{"prompt": ..., "chosen": ..., "rejected": ...}` for preferences; `label` beside a completion: whether it is wanted.

Other keys ride along for evaluators (a database, a gold answer). `origin` says where the row was read (`file:line`).
"""


class Data(ABC):
    """A source of rows with named splits. Used before any process group exists: importing it must not import torch."""

    @abstractmethod
    def check(self) -> None:
        """Raises UserError at once where files are missing, empty or unreadable."""

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Which of `train`, `validation` and `test` there are."""

    @abstractmethod
    def rows(self, split: str) -> Iterable[Row]:
        """The rows of a split, always in the same order."""

    def left_out(self, split: str) -> Sequence[str]:
        """What of a split, when it was last read, gave no row, and a cure, in words for the user; empty: nothing."""
        return ()

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of everything that the rows depend on: the files' contents, the mapping of columns, seeds."""
