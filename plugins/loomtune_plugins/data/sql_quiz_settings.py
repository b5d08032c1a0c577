"""Settings of the generated text-to-SQL task and of its pretraining text."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option

MISTAKES = (
    "table", "column", "value", "number", "spelling", "aggregate", "comparison", "condition", "group", "join", "order",
    "limit", "distinct",
)  # fmt: skip
"""What can be wrong with a query."""


@dataclass
class SqlQuizSettings:
    """How many questions of each split are made. A row depends on its number and the seed, not on the counts."""

    train: int = option(8000, "training questions")
    validation: int = option(200, "validation questions, over schemas of words that training never shows")
    test: int = option(200, "test questions, over schemas of words of their own")
    seed: int = option(0, "another seed makes other questions")
    invented: float = option(0.0, "share of training questions over schemas of made-up names, no two of them the same")
    mistakes: list[str] = option([], "what is wrong with the wrong queries of training, such as table; empty: anything")


@dataclass
class SqlCorpusSettings:
    """How much text is made."""

    rows: int = option(20_000, "texts of 60 to 250 tokens")
    validation: int = option(200, "texts set aside for validation")
    seed: int = option(0, "another seed makes other texts")
