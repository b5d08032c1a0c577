"""What a generated query returns, beside what the right one returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Answer, Data
from loomtune.errors import UserError
from loomtune_plugins.rewards.apart import MEMORY, Apart
from loomtune_plugins.rewards.patterns import timed
from loomtune_plugins.rewards.scored import TOO_LONG, Failure, Scored
from loomtune_plugins.rewards.settings import SqlSettings
from loomtune_plugins.rewards.workers.pool import Pool
from loomtune_plugins.sql_execution import Database, Rows, equal, is_ordered, right_query, written_query

if TYPE_CHECKING:
    from loomtune.run import Run

DATABASES = 64
"""How many stay in a worker's memory: those of the prompts at hand, whose answers come together."""


class Sql(Apart):
    """1 where a query returns what the right one returns, in its order where that has an ORDER BY."""

    name = "sql"

    def __init__(self, settings: SqlSettings) -> None:
        timed("sql", settings.seconds)
        self._settings = settings
        whole = 4 * settings.seconds + 5  # a database, the right query, the written one; SQLite cannot end all of them
        target = f"{__name__}:Queries"
        super().__init__(settings.weight, Pool(target=target, setup=_setup(settings), seconds=whole, memory=MEMORY))

    def check(self, data: Data) -> None:
        """Raises UserError where training rows have no database or no right query."""
        first = next(iter(data.rows("train")), {})
        if "database" not in first or right_query(first) is None:
            what = "reward=sql: rows of `train` have no `database` with a right query (`gold`, `chosen`, `completion`)"
            raise UserError.of(what, "choose another reward, or data whose rows have both")

    def arguments(self, answer: Answer) -> tuple[str, str, str]:
        return str(answer.row.get("database", "")), right_query(answer.row) or "", written_query(answer.text)

    def found(self, run: Run, answers: Sequence[Answer]) -> Sequence[Scored]:
        """A query that even SQLite could not end is one that does not run."""
        slow = self._settings.broken
        scores = super().found(run, answers)
        return [slow if isinstance(one, Failure) and one.kind == TOO_LONG else one for one in scores]


def _setup(settings: SqlSettings) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if key != "weight"}


class Queries:
    """In a worker: runs queries on databases that stay open."""

    def __init__(self, *, valid: float, overlap: float, broken: float, seconds: float) -> None:
        self._valid, self._overlap, self._broken, self._seconds = valid, overlap, broken, seconds
        self._opened = lru_cache(DATABASES)(self._open)

    def __call__(self, script: str, gold: str, query: str) -> float:
        database, expected = self._opened(script, gold)
        if expected is None:
            raise ValueError(f"the right query of a row does not run on its database: {gold!r}")
        found = database.rows(query)
        if found is None:
            return self._broken
        if equal(found, expected, ordered=is_ordered(gold)):
            return 1.0
        common = sum((Counter(found) & Counter(expected)).values())
        return self._valid + self._overlap * 2 * common / max(1, len(found) + len(expected))

    def _open(self, script: str, gold: str) -> tuple[Database, Rows | None]:
        database = Database(script, self._seconds)
        return database, database.rows(gold)
