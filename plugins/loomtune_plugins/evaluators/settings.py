"""Settings of the evaluators."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class HeldoutSettings:
    """Loss on other rows."""

    split: str = option("validation", "split of the data to measure on")
    rows: int = option(0, "at most so many rows; 0: as many as `evaluate.rows` says")


@dataclass
class SQLAccuracySettings:
    """Execution accuracy of text-to-SQL."""

    split: str = option("test", "split of the data to measure on")
    rows: int = option(200, "at most so many rows; 0: as many as `evaluate.rows` says")
    max_tokens: int = option(64, "longest query in tokens; what is longer is cut and most likely wrong")
    seconds: float = option(1.0, "time that a query may take")
