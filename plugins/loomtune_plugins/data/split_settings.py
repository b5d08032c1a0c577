"""Settings that every source of files has: where its splits come from, and which of several answers are compared."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class SplitSettings:
    """Which files, and how much of them."""

    path: str = option(
        "",
        "file of training rows, or a pattern such as `rows-*.parquet`; several: 'data.path=\"a,b\"'",
    )
    validation: str = option("", "files of validation rows")
    test: str = option("", "files of test rows")
    holdout: float = option(0.0, "share of training rows set aside for validation, by a hash of what they say")
    holdout_rows: int = option(
        0, "how many different training rows (prompts with several answers, trees) are set aside"
    )
    stream: bool = option(False, "read and tokenise training rows while the run goes on: for data too large to wait")
    window: int = option(10_000, "how many rows of a stream are read, and permuted, at a time: part of the maths")
    limit: int = option(0, "at most so many rows of each split; 0: all")
    max_record: int = option(8 << 20, "bytes of the largest record; a longer one is refused without holding it")
    max_growth: int = option(200, "how many times its own size an archive may hold; 64 MiB are always allowed")


@dataclass
class OrderSettings(SplitSettings):
    """What is made of several answers to one prompt."""

    pairs: str = option("all", "which answers are compared: all, adjacent (each with the next), best_worst")
    min_gap: float = option(0.0, "answers whose ranks or scores differ by less are not compared")
