"""Settings of a folder of prepared rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option


@dataclass
class PreparedSettings:
    """Which folder, and what rows are made of those that were kept as they came: rankings, scores, pairs."""

    path: str = option("", "folder that `loomtune prepare` wrote")
    format: str = option(
        "auto", "auto (by the keys of each row), completion, messages, text, preference, unpaired, prompt"
    )
    pairs: str = option("all", "which answers are compared: all, adjacent (each with the next), best_worst")
    min_gap: float = option(0.0, "answers whose ranks or scores differ by less are not compared")
    threshold: Optional[float] = option(None, "answers of this score or more are wanted, others not")  # noqa: UP045
    stream: bool = option(False, "read and tokenise training rows while the run goes on: for data too large to wait")
    window: int = option(10_000, "how many rows of a stream are read, and permuted, at a time: part of the maths")
    limit: int = option(0, "at most so many rows of each split; 0: all")
    max_record: int = option(8 << 20, "bytes of the largest row")
