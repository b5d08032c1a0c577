"""The text-to-SQL task: its questions are answerable, its results discriminate, its splits share no name."""

import os
import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter

import pytest

from loomtune.errors import UserError
from loomtune_plugins.data.sql_quiz import generate
from loomtune_plugins.data.sql_quiz.intents import INTENTS
from loomtune_plugins.data.sql_quiz.words import SPLITS
from loomtune_plugins.data.sql_quiz.wrong import mistakes, tables_of
from loomtune_plugins.data.sql_quiz_data import SqlQuiz
from loomtune_plugins.data.sql_quiz_settings import SqlQuizSettings
from loomtune_plugins.sql_execution import executes_same

Row = dict[str, str]
Answer = list[str] | None


def answer(database: str, query: str, ordered: bool = False) -> Answer:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(database)
        found = [repr(row) for row in connection.execute(query)]
    except sqlite3.Error:
        return None
    finally:
        connection.close()
    return found if ordered else sorted(found)


@pytest.fixture(scope="module")
def test_rows() -> list[Row]:
    return list(generate.rows("test", 300))


@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_query_returns_something(split: str) -> None:
    assert all(answer(row["database"], row["completion"]) for row in generate.rows(split, 60, seed=3))


def test_no_query_with_one_mistake_answers_the_same(test_rows: list[Row]) -> None:
    for row in test_rows[:100]:
        ordered = generate.order_matters(row["completion"])
        gold = answer(row["database"], row["completion"], ordered)
        wrong = [mistake.query for mistake in mistakes(row["prompt"], row["completion"], row["database"])]
        assert wrong and row["completion"] not in wrong
        assert all(answer(row["database"], query, ordered) != gold for query in wrong)


def test_every_wrong_query_was_run_and_answers_something_else(test_rows: list[Row]) -> None:
    """By the evaluator's own comparison, for which an average of one number is that number."""
    rng = random.Random(0)
    for row in test_rows[:60]:
        ordered, right = generate.order_matters(row["completion"]), row["completion"]
        for mistake in generate.wrong_queries(row, rng):
            assert mistake.query != right
            assert not executes_same(row["database"], mistake.query, right, ordered=ordered), mistake


def test_a_query_that_answers_the_same_is_not_taken_for_wrong() -> None:
    """With one row the average is the largest is the number; a condition that all meet may be forgotten."""
    database = "CREATE TABLE t (c TEXT, n INTEGER);\nINSERT INTO t VALUES ('x', 5);"
    prompt, gold = "Tables: t(c, n)\nQuestion: mean n where c is x?\nSQL:\n", "SELECT AVG(n) FROM t WHERE c = 'x'"
    every = {mistake.query for mistake in mistakes(prompt, gold, database)}
    wrong = {
        mistake.query
        for mistake in generate.wrong_queries(
            {"prompt": prompt, "completion": gold, "database": database}, random.Random(0)
        )
    }
    same = {"SELECT MAX(n) FROM t WHERE c = 'x'", "SELECT AVG(n) FROM t"}
    assert same <= every and not same & wrong
    assert "SELECT AVG(c) FROM t WHERE c = 'x'" in wrong


def test_first_mistakes_are_of_every_kind_and_half_of_them_run(test_rows: list[Row]) -> None:
    rng = random.Random(0)
    first = [(row, next(generate.wrong_queries(row, rng))) for row in test_rows]
    kinds = Counter(mistake.kind for _, mistake in first)
    assert set(kinds) == {
        "column", "table", "aggregate", "value", "comparison", "order", "limit", "distinct", "condition",
        "number", "group", "join", "spelling",
    }  # fmt: skip
    assert kinds.most_common(1)[0][1] < len(first) / 3
    ran = sum(answer(row["database"], mistake.query) is not None for row, mistake in first)
    assert 0.35 * len(first) < ran < 0.75 * len(first)


def test_no_constant_query_scores_five_percent(test_rows: list[Row]) -> None:
    """Constants are the gold queries themselves, and every result written out as literals."""
    answers = [answer(row["database"], row["completion"]) for row in test_rows]
    literal = Counter(repr(found) for found in answers)
    assert literal.most_common(1)[0][1] < 0.05 * len(test_rows)
    for constant in {row["completion"] for row in test_rows[:60]}:
        hits = sum(answer(row["database"], constant) == gold for row, gold in zip(test_rows, answers, strict=True))
        assert hits < 0.05 * len(test_rows), constant


def test_no_template_answers_more_than_an_eighth_even_with_the_right_names(test_rows: list[Row]) -> None:
    """Whoever knows one intent only, and all names, scores no more than that intent's share."""
    assert Counter(row["intent"] for row in test_rows).most_common(1)[0][1] < 0.12 * len(test_rows)


def test_splits_share_no_name() -> None:
    for first in SPLITS:
        for second in SPLITS:
            assert first == second or not SPLITS[first].all() & SPLITS[second].all()


@pytest.mark.parametrize("split", SPLITS)
def test_rows_use_only_their_own_splits_names(split: str) -> None:
    for row in generate.rows(split, 60):
        tables = tables_of(row["prompt"])
        assert set(tables).union(*tables.values()) <= SPLITS[split].all()


def test_a_word_is_one_kind_of_name_and_no_word_of_a_phrasing() -> None:
    phrasings = " ".join(text for intent in INTENTS for text in (*intent.questions, *intent.comments))
    common = set(re.findall(r"[a-z]+", re.sub(r"\{\w\}", " ", phrasings)))
    for words in SPLITS.values():
        assert len(words.all()) == len(words.tables) + len(words.texts) + len(words.numbers)
        assert not words.all() & common
        assert all(re.fullmatch(r"[a-z]{3,}", word) for word in words.all())


def test_no_name_is_reserved_in_sql() -> None:
    connection = sqlite3.connect(":memory:")
    for word in frozenset().union(*(words.all() for words in SPLITS.values())):
        connection.execute(f"CREATE TABLE {word} ({word} TEXT)")


def test_the_question_determines_the_table(test_rows: list[Row]) -> None:
    """A column that a question names is in one table, but for the column that both share."""
    for row in test_rows:
        columns = Counter(column for listed in tables_of(row["prompt"]).values() for column in listed)
        assert sum(count > 1 for count in columns.values()) == 1


def test_every_intent_occurs_in_every_split() -> None:
    for split in SPLITS:
        assert {row["intent"] for row in generate.rows(split, 600)} == {intent.name for intent in INTENTS}


def test_questions_with_the_same_words_mean_the_same_query() -> None:
    """No phrasing, its slots blanked, belongs to two intents."""
    blanked = Counter(re.sub(r"\{\w\}", "_", text) for intent in INTENTS for text in intent.questions)
    assert blanked.most_common(1)[0][1] == 1


def test_order_matters_where_a_question_asks_for_one() -> None:
    assert generate.order_matters("SELECT a FROM b ORDER BY c")
    assert not generate.order_matters("SELECT a FROM b WHERE c > 1")


def test_a_row_does_not_depend_on_how_many_are_asked_for() -> None:
    assert list(generate.rows("train", 5, seed=2)) == list(generate.rows("train", 9, seed=2))[:5]
    assert list(generate.rows("train", 5, seed=2)) != list(generate.rows("train", 5, seed=3))


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    script = (
        "import hashlib; from loomtune_plugins.data.sql_quiz import corpus, generate;"
        "print(hashlib.sha256(repr([*generate.rows('test', 20), *corpus.texts(20, 0)]).encode()).hexdigest())"
    )
    assert len({_run(script, str(seed)) for seed in (1, 2)}) == 1


def test_the_task_imports_no_torch() -> None:
    script = "import sys, loomtune_plugins.data.sql_quiz.generate as g; print('torch' in sys.modules)"
    assert _run(script, "0") == "False"


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; there are train, validation, test"):
        list(generate.rows("dev", 1))


def _run(script: str, hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_made_up_names_are_of_no_split_and_known_ones_stay_as_they_were() -> None:
    known = list(generate.rows("train", 40))
    mixed = list(generate.rows("train", 40, 0, 0.5))
    same = [one == other for one, other in zip(known, mixed, strict=True)]
    assert 8 < sum(same) < 32, "a row is its own, whatever becomes of others"
    words = frozenset().union(*(split.all() for split in SPLITS.values()))
    for row, is_known in zip(mixed, same, strict=True):
        names = set(re.findall(r"\w+", row["prompt"].splitlines()[0].removeprefix("Tables:")))
        assert names <= words if is_known else not names & words
    assert list(generate.rows("train", 20, 0, 0.5)) == mixed[:20]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_made_up_names_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.invented"):
        SqlQuiz(SqlQuizSettings(invented=share)).check()


def test_held_out_questions_never_have_made_up_names() -> None:
    data = SqlQuiz(SqlQuizSettings(train=2, validation=3, test=3, invented=1.0))
    plain = SqlQuiz(SqlQuizSettings(train=2, validation=3, test=3))
    for split in ("validation", "test"):
        assert list(data.rows(split)) == list(plain.rows(split))
    assert list(data.rows("train")) != list(plain.rows("train"))
