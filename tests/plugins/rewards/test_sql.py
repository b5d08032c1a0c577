"""A query is scored by what it returns; what hangs, breaks or lies harms neither the run nor other answers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import UserError
from loomtune_plugins.data.sql_quiz_data import SqlQuiz
from loomtune_plugins.data.sql_quiz_settings import SqlQuizSettings
from loomtune_plugins.rewards.settings import SqlSettings
from loomtune_plugins.rewards.sql import Queries, Sql

DATABASE = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x');"
GOLD = "SELECT a FROM t"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
STUCK = "SELECT printf('%.*c', 999999, 'a') LIKE '%' || printf('%.*c', 49000, 'a') || 'b'"


@pytest.fixture(scope="module")
def sql() -> Iterator[Sql]:
    made = Sql(SqlSettings(valid=0.25, overlap=0.5, broken=-1.0, seconds=0.2))
    yield made
    made.pool.close()


def queries(**settings: Any) -> Queries:
    return Queries(**{"valid": 0.0, "overlap": 0.0, "broken": 0.0, "seconds": 0.2, **settings})


@pytest.mark.parametrize(
    ("query", "score"),
    [
        ("SELECT t.a FROM t ORDER BY a DESC", 1.0),
        ("SELECT a FROM t WHERE a < 3", 0.25 + 0.5 * 4 / 5),
        ("SELECT b FROM t", 0.25),
        ("SELECT c FROM t", -1.0),
        ("", -1.0),
        ("DROP TABLE t", -1.0),
        (ENDLESS, -1.0),
        ("Sure:\n```sql\nSELECT a FROM t\n```", 1.0),
    ],
)
def test_a_query_is_worth_what_it_returns(
    sql: Sql, run: Any, answered: Callable[..., list[Answer]], query: str, score: float
) -> None:
    assert sql.score(run, answered([query], database=DATABASE, gold=GOLD)) == [pytest.approx(score)]


def test_order_counts_where_the_right_query_asks_for_it() -> None:
    right = "SELECT a FROM t ORDER BY a"
    assert queries()(DATABASE, right, "SELECT a FROM t ORDER BY -a DESC") == 1.0
    assert queries(valid=0.5)(DATABASE, right, "SELECT a FROM t ORDER BY -a") == 0.5


def test_only_the_right_answer_is_worth_anything_unless_settings_say_so() -> None:
    assert [queries()(DATABASE, GOLD, query) for query in (GOLD, "SELECT a FROM t LIMIT 2", "SELECT")] == [
        1.0,
        0.0,
        0.0,
    ]


def test_a_row_that_has_no_right_query_that_runs_leaves_its_answers_out(
    sql: Sql, run: Any, answered: Callable[..., list[Answer]]
) -> None:
    good = answered([GOLD], database=DATABASE, gold=GOLD)
    bad = answered([GOLD], database=DATABASE, gold="SELECT z FROM t") + answered([GOLD], database="nonsense", gold=GOLD)
    scores = sql.score(run, [*good, *bad, *answered([GOLD])])
    assert scores[0] == 1.0 and all(map(math.isnan, scores[1:]))
    assert any("does not run" in told for told in run.told)


def test_generated_queries_are_told_apart(sql: Sql, run: Any) -> None:
    rows = list(SqlQuiz(SqlQuizSettings(train=40)).rows("train"))
    answers = [Answer(row, [], [], row[key], True) for row in rows for key in ("chosen", "rejected")]
    scores = sql.score(run, answers)
    assert scores[::2] == [1.0] * 40 and max(scores[1::2]) < 1.0


def test_a_query_that_even_sqlite_cannot_end_does_not_run(run: Any, answered: Callable[..., list[Answer]]) -> None:
    sql = Sql(SqlSettings(broken=-1.0, seconds=0.1))
    sql.pool.seconds = 2.0
    found = sql.score(run, answered([GOLD, STUCK, GOLD], database=DATABASE, gold=GOLD))
    sql.pool.close()
    assert found == [1.0, -1.0, 1.0]


def test_data_without_databases_are_refused(sql: Sql) -> None:
    class Rows:
        def __init__(self, **row: str) -> None:
            self.row = row

        def rows(self, split: str) -> list[dict[str, str]]:
            return [self.row]

    data: Any = Rows(prompt="?", gold=GOLD, database=DATABASE)
    sql.check(data)
    for row in ({"gold": GOLD}, {"database": DATABASE}):
        data = Rows(prompt="?", **row)
        with pytest.raises(UserError, match="`database`"):
            sql.check(data)


def test_it_can_be_sent_to_another_process_while_its_workers_stay(
    sql: Sql, run: Any, answered: Callable[..., list[Answer]]
) -> None:
    sql.score(run, answered([GOLD], database=DATABASE, gold=GOLD))
    assert sql.pool.processes and not pickle.loads(pickle.dumps(sql)).pool.processes
