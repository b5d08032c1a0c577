"""Execution accuracy of generated SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Data, Evaluator, Row, Sampling
from loomtune.errors import UserError
from loomtune_plugins.evaluators.generation import generated, prompt
from loomtune_plugins.evaluators.settings import SQLAccuracySettings
from loomtune_plugins.evaluators.split import check_split, limit
from loomtune_plugins.sql_execution import executes_same, is_ordered, right_query, written_query

if TYPE_CHECKING:
    from loomtune.run import Run


class SQLAccuracy(Evaluator):
    """Generates a query for each row, greedily, and runs it on the row's database.

    `sql_accuracy` is the share that returns what the right query returns, in its order where that has an ORDER BY;
    `sql_valid` the share that runs at all. Rows too long for the model to be asked count as wrong.
    """

    def __init__(self, settings: SQLAccuracySettings) -> None:
        if settings.max_tokens < 1:
            raise UserError.of("evaluator.sql_accuracy.max_tokens leaves no room for a query", "set it to 64")
        self._settings = settings

    def check(self, data: Data) -> None:
        """Raises UserError where the data lack the split, or its rows a database."""
        check_split(data, "sql_accuracy", self._settings.split)
        first = next(iter(data.rows(self._settings.split)), {})
        if "database" not in first or right_query(first) is None:
            raise UserError.of(
                f"rows of the split '{self._settings.split}' have no database with a right query",
                "leave sql_accuracy out of evaluator=[...], or name data whose rows have `database` and `completion`",
            )

    def reads(self, splits: Sequence[str]) -> Sequence[str]:
        """None: prompts are made of rows."""
        return []

    def evaluate(self, run: Run) -> Mapping[str, float]:
        """Metrics, equal on every rank."""
        self.check(run.data)
        rows = run.rows(self._settings.split, limit(run, self._settings.rows))
        queries = self._queries(run, rows)
        same = ran = 0
        for i in range(run.world.rank, len(rows), run.world.size):  # generated everywhere, executed once
            if run.stop.requested:
                break
            same += self._same(rows[i], queries[i], right_query(rows[i]) or "")
            ran += self._runs(rows[i], queries[i])
        run.heed()
        right, valid = run.world.total([same, ran])
        return {"sql_accuracy": right / max(1, len(rows)), "sql_valid": valid / max(1, len(rows))}

    def _queries(self, run: Run, rows: Sequence[Row]) -> list[str]:
        """The generated query of each row; none, as an empty text, where there is no prompt to ask with."""
        prompts = [prompt(run, row) for row in rows]
        asked = [prompt for prompt in prompts if prompt]
        sampling = Sampling(max_tokens=self._settings.max_tokens, stop=run.tokenizer.stops)
        completions = generated(run, asked, sampling)
        written = ([token for token in tokens if token not in sampling.stop] for tokens in completions)
        return [written_query(run.tokenizer.decode(next(written))) if prompt else "" for prompt in prompts]

    def _same(self, row: Row, query: str, right: str) -> bool:
        seconds = self._settings.seconds
        return executes_same(row["database"], query, right, ordered=is_ordered(right), seconds=seconds)

    def _runs(self, row: Row, query: str) -> bool:
        """Whether a query runs: in the place of the right query, one that fails is an error."""
        try:
            executes_same(row["database"], query, query, ordered=True, seconds=self._settings.seconds)
        except ValueError:
            return False
        return bool(query)
