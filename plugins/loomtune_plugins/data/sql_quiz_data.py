"""The generated text-to-SQL task, and its pretraining text, as sources of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loomtune.contracts import Data, Row
from loomtune.errors import Fault, UserError, near
from loomtune_plugins.data.sql_quiz_settings import MISTAKES, SqlCorpusSettings, SqlQuizSettings

VERSION = 2
"""Part of the fingerprint: raise it when the same questions become other rows."""


class SqlQuiz(Data):
    """Questions over generated SQLite schemas. Train, validation and test share no table or column name."""

    def __init__(self, settings: SqlQuizSettings) -> None:
        self.settings = settings
        self._counts = {"train": settings.train, "validation": settings.validation, "test": settings.test}

    def check(self) -> None:
        """Raises UserError where a count makes no sense, or a mistake is not known."""
        _check_counts(self._counts)
        if not 0 <= self.settings.invented <= 1:
            what = f"data.invented={self.settings.invented:g} is no share"
            raise UserError.of(what, "set data.invented between 0 and 1")
        for kind in self.settings.mistakes:
            if kind not in MISTAKES:
                what = f"data.mistakes names '{kind}', which is none.{near(kind, MISTAKES)}"
                raise UserError.of(what, f"set data.mistakes to some of {', '.join(MISTAKES)}")

    def splits(self) -> tuple[str, ...]:
        """Those with a row."""
        return tuple(split for split, count in self._counts.items() if count > 0)

    def rows(self, split: str) -> Iterable[Row]:
        """One for each of the generator's questions."""
        from loomtune_plugins.data.sql_quiz.generate import rows, wrong_queries

        asked_for = self.settings.mistakes if split == "train" else []  # all kinds are measured
        invented = self.settings.invented if split == "train" else 0.0
        for number, row in enumerate(rows(split, self._counts[split], self.settings.seed, invented), start=1):
            rng = random.Random(f"{self.settings.seed}-{row['schema']}")
            wrong = next(wrong_queries(row, rng, asked_for))
            said = self._said(row["completion"], wrong.query, rng)
            yield {**row, **said, "mistake": wrong.kind, "origin": f"sql_quiz/{split}:{number}"}

    def fingerprint(self) -> str:
        """Digest of the settings and of the generator's source: another grammar makes other rows."""
        return _digest({**asdict(self.settings), "rows": type(self).__name__, "version": VERSION})

    def _said(self, right: str, wrong: str, rng: random.Random) -> dict[str, Any]:
        """A wrong query was run and answers something else; the row's `mistake` says what is wrong with it."""
        return {"chosen": right, "rejected": wrong}


class SqlLabels(SqlQuiz):
    """The same questions with one query each, right or wrong, and whether it is wanted; `gold` is the right one."""

    def _said(self, right: str, wrong: str, rng: random.Random) -> dict[str, Any]:
        """Which, by a coin that belongs to the question."""
        wanted = rng.random() < 0.5
        return {"completion": right if wanted else wrong, "label": wanted, "gold": right}


class SqlCorpus(Data):
    """Pretraining text for the small SQL model: rows of `text`. Validation texts come after the training ones."""

    def __init__(self, settings: SqlCorpusSettings) -> None:
        self.settings = settings

    def check(self) -> None:
        """Raises UserError where a count makes no sense."""
        _check_counts({"rows": self.settings.rows, "validation": self.settings.validation}, first="rows")

    def splits(self) -> tuple[str, ...]:
        """Train, and validation where it has a row."""
        return ("train", "validation") if self.settings.validation else ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        """Rows with `text`."""
        from loomtune_plugins.data.sql_quiz.corpus import texts

        first, count = (0, self.settings.rows) if split == "train" else (self.settings.rows, self.settings.validation)
        made = itertools.islice(texts(first + count, self.settings.seed), first, None)
        for number, text in enumerate(made, start=1):
            yield {"text": text, "origin": f"sql_corpus/{split}:{number}"}

    def fingerprint(self) -> str:
        """Digest of the settings and of the generator's source."""
        return _digest(asdict(self.settings))


def _check_counts(counts: Mapping[str, int], first: str = "train") -> None:
    faults = [
        Fault(f"data.{name}={count} is no number of rows", f"data.{name}= takes {1 if name == first else 0} or more")
        for name, count in counts.items()
        if count < (1 if name == first else 0)
    ]
    if faults:
        raise UserError(*faults)


def _digest(settings: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for source in sorted((Path(__file__).parent / "sql_quiz").glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
