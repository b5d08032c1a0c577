"""What a generated query returns, beside what the right one returns."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from loomtune.contracts import Answer, Data
from loomtune.errors import UserError
from loomtune_plugins.rewards.scored import Failure, Scored, Scores
from loomtune_plugins.rewards.settings import SqlSettings
from loomtune_plugins.sql_execution import Database, Rows, equal, is_ordered, right_query, written_query

if TYPE_CHECKING:
    from loomtune.run import Run

DATABASES = 64
"""How many stay in memory: those of the prompts at hand, whose answers come together."""


class Sql(Scores):
    """1 where a query returns what the right one returns, in its order where that has an ORDER BY."""

    name = "sql"

    def __init__(self, settings: SqlSettings) -> None:
        if not settings.seconds > 0:
            raise UserError.of(f"reward.sql.seconds={settings.seconds} is no time", "set it to 1.0")
        self.weight = settings.weight
        self._settings = settings
        self._tables = lru_cache(DATABASES)(self._open)

    def check(self, data: Data) -> None:
        """Raises UserError where training rows have no database or no right query."""
        first = next(iter(data.rows("train")), {})
        if "database" not in first or right_query(first) is None:
            what = "reward=sql: rows of `train` have no `database` with a right query (`gold`, `chosen`, `completion`)"
            raise UserError.of(what, "choose another reward, or data whose rows have both")

    def found(self, run: Run, answers: Sequence[Answer]) -> Sequence[Scored]:
        known: dict[tuple[str, str, str], Scored] = {}
        scores = []
        for answer in answers:
            key = (str(answer.row["database"]), right_query(answer.row) or "", written_query(answer.text))
            if key not in known:
                known[key] = self._scored(*key)
            scores.append(known[key])
        return scores

    def _scored(self, script: str, gold: str, query: str) -> Scored:
        try:
            database, expected = self._tables(script, gold)
        except sqlite3.Error as error:
            return Failure("a row's database cannot be made", str(error))
        if expected is None:
            return Failure("the right query of a row does not run", gold)
        found = database.rows(query)
        if found is None:
            return self._settings.broken
        if equal(found, expected, ordered=is_ordered(gold)):
            return 1.0
        common = (Counter(found) & Counter(expected)).total()
        return self._settings.valid + self._settings.overlap * 2 * common / max(1, len(found) + len(expected))

    def _open(self, script: str, gold: str) -> tuple[Database, Rows | None]:
        database = Database(script, self._settings.seconds)
        return database, database.rows(gold)
