"""The generated sources of rows, as data plugins; the generator itself has tests of its own."""

import pytest

from loomtune.errors import UserError
from loomtune_plugins.data.sql_quiz_data import SqlCorpus, SqlQuiz
from loomtune_plugins.data.sql_quiz_settings import SqlCorpusSettings, SqlQuizSettings


def test_sql_quiz_has_rows_for_completions_pairs_and_execution() -> None:
    data = SqlQuiz(SqlQuizSettings(train=5, validation=2, test=0))
    data.check()
    assert data.splits() == ("train", "validation")
    rows = list(data.rows("train"))
    assert [row["origin"] for row in rows] == [f"sql_quiz/train:{number}" for number in range(1, 6)]
    for row in rows:
        assert {"prompt", "completion", "database", "schema", "intent"} <= set(row)
        assert row["chosen"] == row["completion"] != row["rejected"]
    assert rows == list(data.rows("train")), "always the same"


def test_more_rows_leave_the_first_ones_as_they_were() -> None:
    few, more = (list(SqlQuiz(SqlQuizSettings(train=count)).rows("train")) for count in (3, 5))
    assert more[:3] == few


def test_sql_corpus_sets_validation_texts_aside_behind_the_training_ones() -> None:
    data = SqlCorpus(SqlCorpusSettings(rows=4, validation=3))
    data.check()
    train, validation = (list(data.rows(split)) for split in data.splits())
    assert (len(train), len(validation)) == (4, 3)
    whole = [row["text"] for row in SqlCorpus(SqlCorpusSettings(rows=7)).rows("train")]
    assert [row["text"] for row in (*train, *validation)] == whole


def test_another_seed_or_count_has_another_fingerprint() -> None:
    variants = [SqlQuizSettings(), SqlQuizSettings(seed=1), SqlQuizSettings(train=9)]
    prints = {SqlQuiz(settings).fingerprint() for settings in variants}
    prints |= {SqlCorpus(settings).fingerprint() for settings in (SqlCorpusSettings(), SqlCorpusSettings(seed=1))}
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("data", "cure"),
    [
        (SqlQuiz(SqlQuizSettings(train=0)), "data.train= takes 1 or more"),
        (SqlQuiz(SqlQuizSettings(test=-1)), "data.test= takes 0 or more"),
        (SqlCorpus(SqlCorpusSettings(rows=0)), "data.rows= takes 1 or more"),
    ],
)
def test_counts_that_make_no_sense_are_refused(data, cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        data.check()
