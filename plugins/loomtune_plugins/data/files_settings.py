"""Settings of data that are read from files."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class FileSettings:
    """Which files, and which of their columns mean what.

    A column that is not named is looked for under its own key (`prompt`, `messages`, ...).
    """

    path: str = option("", "file of training rows, or a pattern such as `rows-*.parquet`, read in order of names")
    validation: str = option("", "file or pattern of validation rows")
    test: str = option("", "file or pattern of test rows")
    format: str = option("auto", "auto (by the columns), completion, messages, text, preference, unpaired or prompt")
    prompt: str = option("", "column of the prompt")
    completion: str = option("", "column of the answer to be learned")
    messages: str = option("", "column of the conversation, a list of role and content")
    text: str = option("", "column of plain text")
    chosen: str = option("", "column of the preferred answer")
    rejected: str = option("", "column of the other answer")
    label: str = option("", "column that says whether the answer is wanted: true or false, 1 or 0")
    holdout: float = option(0.0, "share of training rows set aside for validation, by a hash of what they say")
    holdout_rows: int = option(0, "how many different training rows are set aside for validation")
    limit: int = option(0, "at most so many rows of each split; 0: all")
