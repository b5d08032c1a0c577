"""Several answers to one prompt, in an order of worth: which are compared, and which are wanted."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.jsonl import Jsonl
from loomtune_plugins.data.ordered import Answer, extremes, pairs, tiers
from loomtune_plugins.data.parquet import Parquet
from loomtune_plugins.data.split_settings import OrderSettings

RANKED = {"prompt": "q", "answers": ["a", "b", "c", "d"]}
SCORED = {"prompt": "q", "answers": ["low", "high", "mid", "also mid"], "scores": [1, 9.5, 4, 4]}


def written(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows(tmp_path: Path, *records: dict[str, Any], split: str = "train", **settings: Any) -> list[dict[str, Any]]:
    data = Jsonl(FileSettings(path=written(tmp_path / "rows.jsonl", *records), **settings))
    data.check()
    return [dict(row) for row in data.rows(split)]


def compared(found: Iterable[dict[str, Any]]) -> list[str]:
    return [f"{row['chosen']}>{row['rejected']}" for row in found]


def labelled(found: Iterable[dict[str, Any]]) -> list[tuple[str, bool]]:
    return [(row["completion"], row["label"]) for row in found]


def refusal(tmp_path: Path, *records: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        rows(tmp_path, *records, **settings)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_an_order_of_k_answers_holds_k_choose_2_pairs_none_of_them_turned_round(count: int) -> None:
    answers = [Answer(str(place), -float(place)) for place in range(count)]
    found = [(better.said, worse.said) for better, worse in pairs(answers[::-1], OrderSettings())]
    assert sorted(found) == sorted(itertools.combinations(map(str, range(count)), 2))


def test_ties_are_not_compared_but_each_of_them_is_with_the_others() -> None:
    answers = [Answer("a", 2.0), Answer("b", 1.0), Answer("c", 2.0)]
    assert [[answer.said for answer in tier] for tier in tiers(answers)] == [["a", "c"], ["b"]]
    assert [(x.said, y.said) for x, y in pairs(answers, OrderSettings())] == [("a", "b"), ("c", "b")]


def test_the_same_words_twice_are_not_compared() -> None:
    assert not list(pairs([Answer("a", 2.0), Answer("a", 1.0)], OrderSettings()))


def test_nothing_is_best_where_all_tie() -> None:
    assert not list(extremes([Answer("a", 1.0), Answer("b", 1.0)], OrderSettings()))
    assert not list(extremes([], OrderSettings()))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "a>b a>c a>d b>c b>d c>d"),
        ({"pairs": "adjacent"}, "a>b b>c c>d"),
        ({"pairs": "best_worst"}, "a>d"),
        ({"min_gap": 2}, "a>c a>d b>d"),
        ({"min_gap": 2, "pairs": "best_worst"}, "a>d"),
    ],
)
def test_settings_say_which_answers_of_a_ranking_are_compared(tmp_path: Path, settings: dict, wanted: str) -> None:
    assert compared(rows(tmp_path, RANKED, answers="answers", **settings)) == wanted.split()


def test_a_ranking_by_numbers_has_ties_and_answers_that_nobody_ranked(tmp_path: Path) -> None:
    found = rows(tmp_path, {**RANKED, "ranks": [2, 0, 2, None]})
    assert compared(found) == ["b>a", "b>c"]
    assert [row["margin"] for row in found] == [2.0, 2.0]


def test_ratings_become_pairs_with_their_difference_as_the_margin(tmp_path: Path) -> None:
    found = rows(tmp_path, SCORED)
    assert compared(found) == ["high>mid", "high>also mid", "high>low", "mid>low", "also mid>low"]
    assert [row["margin"] for row in found] == [5.5, 5.5, 8.5, 3.0, 3.0]
    assert {row["prompt"] for row in found} == {"q"} and {row["origin"] for row in found} == {"rows.jsonl:1"}
    assert compared(rows(tmp_path, SCORED, pairs="best_worst")) == ["high>low"]
    assert compared(rows(tmp_path, SCORED, min_gap=5.5)) == ["high>mid", "high>also mid", "high>low"]


def test_a_margin_that_the_file_itself_has_is_not_overwritten(tmp_path: Path) -> None:
    assert {row["margin"] for row in rows(tmp_path, {**SCORED, "margin": 77})} == {77}
    assert {row["margin"] for row in rows(tmp_path, {**RANKED, "margin": 77}, answers="answers")} == {77}
    labels = rows(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b", "label": "a class"}, format="unpaired")
    assert [row["label"] for row in labels] == [True, False]


def test_a_threshold_makes_labels_of_ratings(tmp_path: Path) -> None:
    assert labelled(rows(tmp_path, SCORED, threshold=4)) == [
        ("low", False),
        ("high", True),
        ("mid", True),
        ("also mid", True),
    ]


def test_a_threshold_makes_labels_of_single_rated_answers(tmp_path: Path) -> None:
    rated = [{"prompt": "q", "response": f"r{stars}", "stars": stars} for stars in (1, 3, 5)]
    found = rows(tmp_path, *rated, completion="response", score="stars", threshold=3)
    assert labelled(found) == [("r1", False), ("r3", True), ("r5", True)]
    assert [row["stars"] for row in found] == [1, 3, 5], "the score rides along"


def test_without_a_threshold_the_best_and_the_worst_are_labelled_and_none_between(tmp_path: Path) -> None:
    assert labelled(rows(tmp_path, SCORED, format="unpaired")) == [("high", True), ("low", False)]
    assert labelled(rows(tmp_path, RANKED, format="unpaired")) == [("a", True), ("d", False)]
    ranked = {**RANKED, "ranks": [1, 0, 0, 1]}
    assert labelled(rows(tmp_path, ranked, format="unpaired")) == [("b", True), ("c", True), ("a", False), ("d", False)]


def test_pairs_become_two_labelled_rows_where_labels_are_asked_for(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad", "id": 7}
    found = rows(tmp_path, pair, format="unpaired")
    assert labelled(found) == [("good", True), ("bad", False)]
    assert all(row["id"] == 7 and "chosen" not in row for row in found)
    named = {"prompt": "q", "win": "good", "lose": "bad"}
    assert labelled(rows(tmp_path, named, format="unpaired", chosen="win", rejected="lose")) == labelled(found)


TOLD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
GOOD, BAD = ([{"role": "assistant", "content": said}] for said in ("good", "bad"))


def test_what_two_conversations_begin_with_is_their_prompt(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"chosen": [*TOLD, *GOOD], "rejected": [*TOLD, *BAD], "id": 7})
    assert (row["prompt"], row["chosen"], row["rejected"], row["id"]) == (TOLD, GOOD, BAD, 7)
    found = rows(tmp_path, {"chosen": [*TOLD, *GOOD], "rejected": [*TOLD[:1], *BAD]}, format="unpaired")
    rest = [*TOLD[1:], *GOOD]
    assert [(row["prompt"], row["completion"], row["label"]) for row in found] == [
        (TOLD[:1], rest, True),
        (TOLD[:1], BAD, False),
    ]
    named = rows(tmp_path, {"win": [*TOLD, *GOOD], "lose": [*TOLD, *BAD]}, chosen="win", rejected="lose")
    assert [(row["prompt"], row["chosen"]) for row in named] == [(TOLD, GOOD)]
    (given,) = rows(tmp_path, {"prompt": "p", "chosen": [*TOLD, *GOOD], "rejected": [*TOLD, *BAD]})
    assert given["prompt"] == "p", "a prompt that the file has is the prompt"
    same = rows(tmp_path, {"chosen": [*TOLD, *GOOD], "rejected": [*TOLD, *GOOD]})
    assert same[0]["prompt"] == TOLD, "an answer stays where both say the same"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"chosen": GOOD, "rejected": BAD}, "rows.jsonl:2: has no prompt: .* do not begin with the same message"),
        ({"chosen": "good", "rejected": [*TOLD, *BAD]}, "rows.jsonl:2: has no prompt: .* not both conversations"),
    ],
)
def test_conversations_without_a_common_start_are_named(tmp_path: Path, record: dict, told: str) -> None:
    good = {"chosen": [*TOLD, *GOOD], "rejected": [*TOLD, *BAD]}
    assert re.search(told, refusal(tmp_path, good, record))


def test_the_best_answer_is_learned_where_completions_are_asked_for(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, SCORED, format="completion")
    assert (row["prompt"], row["completion"]) == ("q", "high")
    said = [{"role": "user", "content": "q"}]
    (row,) = rows(tmp_path, {**RANKED, "prompt": said}, format="completion")
    assert row["messages"] == [*said, {"role": "assistant", "content": "a"}]


def test_answers_may_be_conversations(tmp_path: Path) -> None:
    answers = [[{"from": "gpt", "value": said}] for said in "ab"]
    (row,) = rows(tmp_path, {"prompt": "q", "answers": answers}, answers="answers")
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]


def test_answers_and_numbers_may_be_fields_of_objects(tmp_path: Path) -> None:
    entries = [{"response": "x", "overall": 2.0}, {"response": "y", "overall": 4.5}]
    record = {"instruction": "q", "completions": entries}
    settings = {"prompt": "instruction", "answers": "completions.response", "scores": "completions.overall"}
    assert compared(rows(tmp_path, record, **settings)) == ["y>x"]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "rows.parquet")
    data = Parquet(FileSettings(path=str(tmp_path / "rows.parquet"), **settings))
    assert compared(data.rows("train")) == ["y>x"]


@pytest.mark.parametrize("settings", [{"holdout": 0.4}, {"holdout_rows": 5}])
def test_all_pairs_of_a_prompt_are_in_the_same_split_whatever_is_made_of_them(tmp_path: Path, settings: dict) -> None:
    records = [{**RANKED, "prompt": f"q{number}"} for number in range(20)]
    held = rows(tmp_path, *records, answers="answers", split="validation", **settings)
    kept = rows(tmp_path, *records, answers="answers", **settings)
    asked = {row["prompt"] for row in held}
    assert (
        len(held) == 6 * len(asked) and len(kept) == 6 * (20 - len(asked)) and not asked & {r["prompt"] for r in kept}
    )
    assert len(asked) == 5 or "holdout" in settings
    for other in ("unpaired", "completion"):
        again = rows(tmp_path, *records, format=other, answers="answers", split="validation", **settings)
        assert {row["prompt"] for row in again} == asked


def test_a_prompt_without_two_different_answers_gives_no_row_and_the_others_do(tmp_path: Path) -> None:
    tied = {"prompt": "t", "answers": ["a", "b"], "scores": [1, 1]}
    assert compared(rows(tmp_path, tied, SCORED, {**tied, "answers": [], "scores": []}, pairs="best_worst")) == [
        "high>low"
    ]


def test_records_that_give_no_row_are_counted_of_each_split(tmp_path: Path) -> None:
    tied = {**SCORED, "scores": [1, 1, 1, 1]}
    validation = written(tmp_path / "validation.jsonl", SCORED)
    path = written(tmp_path / "train.jsonl", SCORED, tied, SCORED, {**tied, "prompt": "other"})
    data = Jsonl(FileSettings(path=path, validation=validation))
    assert not data.left_out("train"), "nothing was read yet"
    for _ in range(2):
        assert [len(list(data.rows(split))) for split in data.splits()] == [10, 5]
        what, cure = data.left_out("train")
        assert what == "2 of 4 records of train give no row" and "data.min_gap" in cure
        assert not data.left_out("validation")


def test_a_run_tells_what_gave_no_row_each_time_it_is_prepared(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOMTUNE_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path / "train.jsonl", SCORED, {**SCORED, "scores": [1, 1, 1, 1]})
    keys = [f"model.path={tiny_model}", "data=jsonl", f"data.path={path}", "objective=dpo", "steps=1"]
    for number in range(2):
        api.prepare(api.compose([*keys, f"run.dir={tmp_path}/run{number}"]))
        assert "warning: 1 of 2 records of train give no row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "settings", "told"),
    [
        ({**SCORED, "scores": [1, 2]}, {}, ["rows.jsonl:2: 'scores' has 2 numbers for 4 answers"]),
        ({**SCORED, "scores": [1, 2, "3", 4]}, {}, ["rows.jsonl:2: 'scores' is text, not a number"]),
        ({**SCORED, "scores": [1, 2, True, 4]}, {}, ["rows.jsonl:2: 'scores' is true or false, not a number"]),
        ({**SCORED, "scores": [1, 2, float("nan"), 4]}, {}, ["rows.jsonl:2: 'scores' is", "NaN"]),
        ({**SCORED, "scores": 3}, {}, ["rows.jsonl:2: 'scores' is a number, not a list"]),
        ({**SCORED, "answers": "a"}, {}, ["rows.jsonl:2: 'answers' is text, not a list"]),
        ({**SCORED, "answers": ["a", 2, "c", "d"]}, {}, ["rows.jsonl:2: 'answers' answer 2 is a number, not text"]),
        ({"prompt": "q", "answers": ["a"]}, {}, ["rows.jsonl:2: has no column 'scores'"]),
    ],
)
def test_a_bad_order_is_named_with_its_line(tmp_path: Path, record: dict, settings: dict, told: list[str]) -> None:
    said = refusal(tmp_path, SCORED, record, **settings)
    assert all(words in said for words in told), said
    assert "mend these records" in said


def test_a_bad_entry_of_a_list_of_objects_is_named(tmp_path: Path) -> None:
    good = {"prompt": "q", "answers": [{"text": "a"}, {"text": "b"}]}
    for entries, told in (
        ([{"text": "a"}, {"txt": "b"}], "rows.jsonl:2: 'answers' entry 2 has no 'text'; it has txt"),
        (["a"], "rows.jsonl:2: 'answers' entry 1 is text, not an object"),
        ("a", "rows.jsonl:2: 'answers' is text, not a list"),
    ):
        assert told in refusal(tmp_path, good, {**good, "answers": entries}, answers="answers.text")


@pytest.mark.parametrize(
    ("record", "settings", "told"),
    [
        (RANKED, {"pairs": "al", "answers": "answers"}, ["data.pairs=al is not known", "best_worst"]),
        (RANKED, {"min_gap": -1, "answers": "answers"}, ["data.min_gap=-1 is negative"]),
        (RANKED, {"threshold": 3.0, "answers": "answers"}, ["has no column 'scores'", "data.scores"]),
        (RANKED, {"format": "unpaired", "pairs": "adjacent"}, ["data.pairs=adjacent is never used"]),
        (SCORED, {"threshold": 3.0, "min_gap": 1}, ["data.min_gap=1 is never used", "leave out data.threshold"]),
        (SCORED, {"format": "preference", "threshold": 3.0}, ["data.threshold=3.0 is never used", "format=unpaired"]),
        ({"prompt": "q", "completion": "a"}, {"pairs": "adjacent"}, ["data.pairs=adjacent is never used"]),
        ({"prompt": "q", "completion": "a"}, {"min_gap": 2}, ["data.min_gap=2 is never used", "data.answers"]),
        ({"prompt": "q", "completion": "a", "s": 1}, {"score": "s"}, ["data.threshold is not set"]),
        (
            {"prompt": "q", "list": ["a"]},
            {"answers": "lst"},
            ["no column 'lst'", "Did you mean 'list'?"],
        ),
        (RANKED, {"format": "completion", "scores": "ranks"}, ["no column 'ranks'"]),
        (
            RANKED,
            {"format": "preference", "answers": "answers", "chosen": "c"},
            ["data.chosen=c and data.answers=answers"],
        ),
        ({"prompt": "q", "answers": ["a", "a"]}, {"answers": "answers"}, ["no record of", "gives a row", "min_gap"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"threshold": 3.0}, ["data.threshold=3.0 is never used"]),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"threshold": 3.0, "format": "unpaired"},
            ["data.threshold=3.0 is never used", "prompt, chosen, rejected"],
        ),
        (
            {"question": "q", "chosen": "a", "rejected": "b"},
            {"threshold": 3.0, "prompt": "question"},
            ["data.threshold=3.0 is never used"],
        ),
        ({"prompt": "q", "completion": "a", "label": True}, {"threshold": 3.0}, ["data.threshold=3.0 is never used"]),
        ({"chosen": "a", "rejected": "b"}, {}, ["no format can be made", "data.prompt="]),
        (SCORED, {"min_gap": 100}, ["no record of", "lower data.min_gap"]),
    ],
)
def test_settings_that_would_do_nothing_or_cannot_work_are_refused(
    tmp_path: Path, record: dict, settings: dict, told: list[str]
) -> None:
    said = refusal(tmp_path, record, **settings)
    assert all(words in said for words in told), said


def test_a_list_without_numbers_is_no_ranking_until_somebody_says_so(tmp_path: Path) -> None:
    """Other files list answers that are all right."""
    (row,) = rows(tmp_path, {**RANKED, "completion": "the one"})
    assert row["completion"] == "the one" and row["answers"] == RANKED["answers"]
    (row,) = rows(tmp_path, {"prompt": "q", "completion": "c", "score": 0.5})
    assert set(row) == {"prompt", "completion", "score", "origin"}
