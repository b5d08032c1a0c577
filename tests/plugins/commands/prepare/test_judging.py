"""What stages answer is checked, counted and told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from loomtune.contracts import Dropped, Row, RowStage
from loomtune.errors import RunFailed
from loomtune_plugins.commands.prepare import counts, job


class Answering(RowStage):
    """Answers as a function says."""

    def __init__(self, answer: Callable[[list[Any]], Any]) -> None:
        self._answer = answer

    def apply(self, rows: Sequence[Row]) -> Any:
        return self._answer(list(rows))


@pytest.fixture
def answering(prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Prepares points through a stage that answers as a function says."""

    def run(points: Any, answer: Callable[[list[Any]], Any], *others: str) -> Any:
        build = job.installed().build

        def build_it(self: Any, axis: str, name: str, settings: Any) -> Any:
            return Answering(answer) if name == "answering" else build(axis, name, settings)

        with monkeypatch.context() as patch:
            patch.setattr(job.installed, "build", build_it)
            return prepared(points, "answering", *others)

    return run


def at_six(answer: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return lambda rows: [answer(row) if row["point"] == 6 else row for row in rows]


def leave(rows: Any) -> Any:
    sys.exit("enough")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda rows: None, "stage=answering failed at train:1: TypeError: gave None and no list of answers"),
        (lambda rows: rows[:1], "stage=answering failed at train:1 or one of 2 rows after it: ValueError: gave 1 ans"),
        (at_six(lambda row: None), "stage=answering gave None for train:2, which is neither a row nor Dropped"),
        (at_six(lambda row: "a text"), "stage=answering gave a str for train:2, which is neither"),
        (at_six(lambda row: {"text": "x"}), "stage=answering gave a row for train:2 whose origin is None"),
        (at_six(lambda row: {**row, "origin": "train:1"}), "a row for train:2 whose origin is 'train:1'"),
        (at_six(lambda row: {"origin": "train:2"}), "a row for train:2 in which nothing is said"),
        (at_six(lambda row: {**row, "more": float("nan")}), "stage=answering gave what is not kept: train:2 is no row"),
        (at_six(lambda row: {**row, "more": {1}}), "stage=answering gave what is not kept: train:2 is no row"),
        (at_six(lambda row: Dropped("train:1", "why")), "stage=answering dropped train:2 as 'train:1'"),
        (at_six(lambda row: Dropped("train:2", "")), "stage=answering dropped train:2 without a reason"),
        (at_six(leave), "stage=answering failed at train:2: SystemExit: enough"),
    ],
)
def test_what_is_no_answer_is_fatal_and_names_stage_and_row(answering: Any, answer: Any, told: str) -> None:
    with pytest.raises(RunFailed) as failed:
        answering([4, 6, 8], answer)
    assert told in str(failed.value)
    assert "cure: tell the author of answering" in str(failed.value)


def test_rows_that_a_stage_changed_are_counted_with_what_they_were(answering: Any) -> None:
    done = answering([4, 6, 8], at_six(lambda row: {**row, "text": "another " + row["text"]}))
    (stage,) = done.manifest["stages"]
    assert stage["changed"]["rows"] == 1
    assert stage["changed"]["examples"] == [
        {"origin": "train:2", "before": '{"text":"point 6"}', "after": '{"text":"another point 6"}'}
    ]


def test_rows_that_are_changed_in_their_place_count_as_changed(answering: Any) -> None:
    def change(rows: list[Any]) -> Any:
        for row in rows:
            row["text"] = row["text"].upper()
        return rows

    done = answering([4, 6, 8], change, "apart")
    assert done.manifest["stages"][0]["changed"]["rows"] == 3
    assert done.manifest["stages"][0]["changed"]["examples"][0]["before"] == '{"text":"point 4"}'
    assert [row["text"] for row in done.rows()] == ["POINT 4", "POINT 8"]


def test_what_stages_do_to_rows_that_inputs_held_out_is_told(answering: Any) -> None:
    done = answering({"train": [4, 6], "test": [6, 40]}, at_six(lambda row: Dropped(row["origin"], "six", row=row)))
    assert done.manifest["stages"][0]["held"] == {"test": {"dropped": 1}}


def test_of_two_rows_what_is_around_their_first_difference_is_shown() -> None:
    one, other = ({"text": "same " * 100 + word + " same" * 100} for word in ("mine", "theirs"))
    shown = counts.apart(one, other)
    assert "mine" in shown[0]
    assert "theirs" in shown[1]
    assert all(len(text) <= 203 for text in shown)


def test_a_duplicate_is_shown_beside_the_row_that_stays(prepared: Callable[..., Any]) -> None:
    (stage,) = prepared([40, 41], "apart").manifest["stages"]
    (shown,) = stage["dropped"]["near another"]["examples"]
    assert (shown["excerpt"], shown["stays"]) == ('{"text":"point 41"}', '{"text":"point 40"}')
