"""Settings of the evaluators."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class HeldoutSettings:
    """Loss on other rows."""

    split: str = option("validation", "split of the data to measure on")
    rows: int = option(0, "at most so many rows; 0: as many as `evaluate.rows` says")


@dataclass
class RewardedSettings:
    """What the chosen rewards say of the answers to held-out prompts."""

    split: str = option("validation", "split of the data whose prompts are answered")
    rows: int = option(0, "at most so many rows; 0: as many as `evaluate.rows` says")
    max_tokens: int = option(256, "longest answer in tokens; what is longer is cut")
    samples: int = option(1, "answers to each prompt")
    temperature: float = option(0.0, "0: the likeliest token each time; else tokens are drawn")
    top_k: int = option(0, "draw from so many of the likeliest tokens only; 0: from all")
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this probability together")


@dataclass
class SQLAccuracySettings:
    """Execution accuracy of text-to-SQL."""

    split: str = option("test", "split of the data to measure on")
    rows: int = option(200, "at most so many rows; 0: as many as `evaluate.rows` says")
    max_tokens: int = option(64, "longest query in tokens; what is longer is cut and most likely wrong")
    seconds: float = option(1.0, "time that a query may take")
