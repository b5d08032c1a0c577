"""The generated sources of rows, as data plugins; the generator itself has tests of its own."""

from pathlib import Path

import pytest

from loomtune import api
from loomtune.contracts import Objective
from loomtune.errors import UserError
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.data.sql_quiz_data import SqlCorpus, SqlLabels, SqlQuiz
from loomtune_plugins.data.sql_quiz_settings import MISTAKES, SqlCorpusSettings, SqlQuizSettings
from loomtune_plugins.objectives.dpo import Dpo
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.reward import RewardModel
from loomtune_plugins.objectives.reward_settings import RewardSettings
from loomtune_plugins.sql_execution import executes_same, right_query


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


def test_sql_quiz_pairs_say_what_is_wrong_with_the_rejected_query() -> None:
    rows = list(SqlQuiz(SqlQuizSettings(train=60)).rows("train"))
    assert len({row["mistake"] for row in rows}) > 5
    for row in rows:
        ordered = " ORDER BY " in row["chosen"]
        assert executes_same(row["database"], row["chosen"], row["completion"], ordered=ordered)
        assert not executes_same(row["database"], row["rejected"], row["chosen"], ordered=ordered)


def test_sql_quiz_labels_are_of_one_answer_to_each_question() -> None:
    unpaired = SqlLabels(SqlQuizSettings(train=200))
    unpaired.check()
    labelled, pairs = list(unpaired.rows("train")), list(SqlQuiz(SqlQuizSettings(train=200)).rows("train"))
    assert [row["prompt"] for row in labelled] == [row["prompt"] for row in pairs]
    for row, pair in zip(labelled, pairs, strict=True):
        assert row["completion"] == pair["chosen" if row["label"] else "rejected"]
    assert 70 < sum(row["label"] for row in labelled) < 130


def test_the_right_query_of_a_labelled_row_is_not_its_wrong_answer() -> None:
    rows = SqlLabels(SqlQuizSettings(train=20)).rows("train")
    wrong = next(row for row in rows if not row["label"])
    assert right_query(wrong) == wrong["gold"] != wrong["completion"]
    right = next(row for row in SqlQuiz(SqlQuizSettings(train=20)).rows("train") if row["prompt"] == wrong["prompt"])
    assert right_query(wrong) == right["chosen"] and not {"chosen", "rejected"} & {*wrong}, (
        "no objective of pairs reads it"
    )


def test_training_may_be_of_some_mistakes_and_is_measured_on_all() -> None:
    data = SqlQuiz(SqlQuizSettings(train=40, validation=40, mistakes=["table"]))
    data.check()
    train, validation = ({row["mistake"] for row in data.rows(split)} for split in ("train", "validation"))
    assert train == {"table"} and len(validation) > 5
    assert list(data.rows("validation")) == list(SqlQuiz(SqlQuizSettings(validation=40)).rows("validation"))


def test_the_settings_know_every_kind_of_mistake() -> None:
    rows = SqlQuiz(SqlQuizSettings(train=500)).rows("train")
    assert {row["mistake"] for row in rows} == set(MISTAKES)


def test_an_unknown_mistake_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'table'"):
        SqlQuiz(SqlQuizSettings(mistakes=["tables"])).check()


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "reward"])
def test_mistakes_that_an_objective_never_reads_are_refused_before_the_run(tiny_model: Path, objective: str) -> None:
    data = "sql_labels" if objective == "kto" else "sql_quiz"
    keys = [f"model.path={tiny_model}", f"data={data}", "data.mistakes=[table]", f"objective={objective}"]
    if objective == "sft":
        with pytest.raises(UserError, match=r"data\.mistakes=\[table\] is never used: objective=sft"):
            api.check(api.compose(keys))
        keys.remove("data.mistakes=[table]")
    assert not [found for found in api.check(api.compose(keys)) if "mistakes" in found.what]


@pytest.mark.parametrize(("objective", "data"), [("kto", "sql_quiz"), ("dpo", "sql_labels"), ("sft", "sql_labels")])
def test_pairs_and_labels_are_not_taken_for_each_other(tiny_model: Path, objective: str, data: str) -> None:
    keys = [f"model.path={tiny_model}", f"data={data}", f"objective={objective}", "recipe=null"]
    with pytest.raises(UserError, match=f"objective={objective} needs `.*`, which nothing chosen provides"):
        api.check(api.compose(keys))


@pytest.mark.parametrize("objective", [Dpo(DpoSettings()), RewardModel(RewardSettings())])
def test_labelled_queries_are_no_pairs(objective: Objective) -> None:
    (row,) = SqlLabels(SqlQuizSettings(train=1)).rows("train")
    with pytest.raises(ValueError, match=r"has no chosen answer; it has prompt, .*label.*: set data.format=preference"):
        objective.sample(row, ToyTokenizer(), 1000)


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
    variants = [{}, {"seed": 1}, {"train": 9}, {"mistakes": ["table"]}]
    prints = {SqlQuiz(SqlQuizSettings(**settings)).fingerprint() for settings in variants}
    prints.add(SqlLabels(SqlQuizSettings()).fingerprint())
    prints |= {SqlCorpus(settings).fingerprint() for settings in (SqlCorpusSettings(), SqlCorpusSettings(seed=1))}
    assert len(prints) == 7


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
