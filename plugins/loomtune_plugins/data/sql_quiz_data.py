"""The generated text-to-SQL task, and its pretraining text, as sources of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from loomtune.contracts import Data, Row
from loomtune.errors import Fault, UserError
from loomtune_plugins.data.sql_quiz_settings import SqlCorpusSettings, SqlQuizSettings


class SqlQuiz(Data):
    """Questions over generated SQLite schemas. Train, validation and test share no table or column name."""

    def __init__(self, settings: SqlQuizSettings) -> None:
        self.settings = settings
        self._counts = {"train": settings.train, "validation": settings.validation, "test": settings.test}

    def check(self) -> None:
        """Raises UserError where a count makes no sense."""
        _check_counts(self._counts)

    def splits(self) -> tuple[str, ...]:
        """Those with a row."""
        return tuple(split for split, count in self._counts.items() if count > 0)

    def rows(self, split: str) -> Iterable[Row]:
        """The generator's rows; `chosen` is the right query and `rejected` a plausible wrong one."""
        from loomtune_plugins.data.sql_quiz.generate import rows, wrong_queries

        for number, row in enumerate(rows(split, self._counts[split], self.settings.seed), start=1):
            wrong = next(wrong_queries(row, random.Random(f"{self.settings.seed}-{row['schema']}")))
            yield {**row, "chosen": row["completion"], "rejected": wrong, "origin": f"sql_quiz/{split}:{number}"}

    def fingerprint(self) -> str:
        """Digest of the settings and of the generator's source: another grammar makes other rows."""
        return _digest(asdict(self.settings))


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
