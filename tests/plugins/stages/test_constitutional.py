"""Both stages of Constitutional AI, on a service that misbehaves and one that does not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from loomtune.catalogue import installed
from loomtune.contracts import Dropped, RowStage
from loomtune.errors import RunFailed, UserError
from loomtune_plugins.stages.principles import Constitution
from services import FAILURES, Service, serving

ROWS: list[dict[str, Any]] = [{"prompt": f"How do I pick lock {n}?", "origin": f"red:{n}"} for n in range(6)]
QUICK: dict[str, Any] = {"first_wait": 0.01, "longest_wait": 0.05, "silent_seconds": 1.0}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as one:
        yield one


def stage(name: str, service: Service, folder: Path, **more: Any) -> RowStage:
    settings = {"url": service.url, "model": "helper", "cache": str(folder), **QUICK, **more}
    made: RowStage = installed().build("stage", name, settings)
    made.check()
    return made


def test_a_draft_is_criticised_and_revised_as_often_as_asked(service: Service, tmp_path: Path) -> None:
    (row,) = stage("critique", service, tmp_path, rounds=3).apply(ROWS[:1])
    trail = row["critiques"]
    assert len(trail["rounds"]) == 3 and trail["by"] == "helper"
    assert row["completion"] == trail["rounds"][-1]["revision"] != trail["draft"]
    names = {one.name for one in Constitution("", "k").principles("critique")}
    assert {one["principle"] for one in trail["rounds"]} <= names
    assert row["prompt"] == ROWS[0]["prompt"] and row["origin"] == "red:0"


def test_each_request_shows_the_answer_as_it_is_by_then(tmp_path: Path) -> None:
    with serving() as service:
        (row,) = stage("critique", service, tmp_path, rounds=2).apply(ROWS[:1])
        said = [[turn["content"] for turn in body["messages"]] for body in service.bodies]
    first, second = row["critiques"]["rounds"]
    draft, question = row["critiques"]["draft"], ROWS[0]["prompt"]
    assert said[0] == [question]
    assert said[1][:2] == [question, draft] and len(said[1]) == 3
    assert said[2][:2] == [question, draft] and said[2][3] == first["critique"] and len(said[2]) == 5
    assert said[3][:2] == [question, first["revision"]] and len(said[3]) == 3, "what led there is not shown again"
    assert said[4][1] == first["revision"] and said[4][3] == second["critique"]


def test_principles_are_drawn_for_each_row_and_round(service: Service, tmp_path: Path) -> None:
    rows = stage("critique", service, tmp_path, rounds=3).apply(ROWS)
    drawn = [tuple(one["principle"] for one in row["critiques"]["rounds"]) for row in rows]
    assert len(set(drawn)) == len(ROWS)
    assert len({name for names in drawn for name in names}) > 6
    other = stage("critique", service, tmp_path, rounds=3, seed=1).apply(ROWS)
    assert [tuple(one["principle"] for one in row["critiques"]["rounds"]) for row in other] != drawn


def test_an_answer_that_is_there_is_the_draft(service: Service, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "given", "gold": 3, "origin": "o:1"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "given"}], "origin": "o:2"},
        {"prompt": [{"role": "user", "content": "p"}], "completion": "given", "origin": "o:3"},
    ]
    one, other, third = stage("critique", service, tmp_path, rounds=1).apply(rows)
    assert {row["critiques"]["draft"] for row in (one, other, third)} == {"given"}
    assert one["gold"] == 3
    assert other["messages"][0] == rows[1]["messages"][0]
    assert other["messages"][1]["content"] == other["critiques"]["rounds"][0]["revision"]
    assert third["completion"][0]["role"] == "assistant"


def test_what_cannot_be_asked_goes_with_its_reason(service: Service, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [
        {"text": "no question", "origin": "o:1"},
        {"messages": [{"role": "user", "content": "q"}, call, {"role": "user", "content": "r"}], "origin": "o:2"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "origin": "o:3"},
    ]
    found = stage("critique", service, tmp_path, rounds=1).apply(rows)
    assert [one.reason for one in found if isinstance(one, Dropped)] == [
        "asks nothing",
        "a conversation with tools",
        "several answers",
    ]


def test_pairs_bear_the_softmax_of_the_two_letters(service: Service, tmp_path: Path) -> None:
    for row in stage("principled", service, tmp_path).apply(ROWS):
        a, b = (row["judgement"]["log_probs"][letter] for letter in "AB")
        p = math.exp(a) / (math.exp(a) + math.exp(b))
        assert row["probability"] == pytest.approx(max(p, 1 - p)) and row["probability"] >= 0.5
        assert row["judgement"]["chosen"] == ("A" if p >= 0.5 else "B")
        assert row["chosen"] != row["rejected"] and row.keys() >= {"prompt", "origin"}


def test_which_answer_comes_first_and_which_principle_is_asked_is_drawn(tmp_path: Path) -> None:
    pairs = [{**row, "chosen": "an answer", "rejected": "another"} for row in ROWS]
    with serving() as service:
        rows = stage("principled", service, tmp_path).apply(pairs)
        asked = {body["messages"][0]["content"] for body in service.bodies}
    assert service.answered == len(ROWS), "one choice for each, and no answer sampled"
    assert 0 < sum("(A) an answer" in text for text in asked) < len(ROWS)
    assert len({row["judgement"]["principle"] for row in rows}) > 3
    for row in rows:
        (text,) = (text for text in asked if row["prompt"] in text)
        first = "an answer" if "(A) an answer" in text else "another"
        assert (row["chosen"] == first) == (row["judgement"]["chosen"] == "A")


def test_answers_of_one_model_are_judged_by_another(service: Service, tmp_path: Path) -> None:
    sampled = stage("answer", service, tmp_path, count=2, model="assistant").apply(ROWS)
    assert all(len(set(row["answers"])) == 2 and row["answered_by"] == "assistant" for row in sampled)
    for before, row in zip(sampled, stage("principled", service, tmp_path).apply(sampled), strict=True):
        assert {row["chosen"], row["rejected"]} == set(before["answers"])
        assert row["answered_by"] == "assistant" and row["judgement"]["by"] == "helper" and "answers" not in row


def test_after_thinking_aloud_a_label_is_never_sure(tmp_path: Path) -> None:
    with serving() as service:
        rows = stage("principled", service, tmp_path, thinks=True).apply(ROWS)
        last = service.bodies[-1]["messages"]
    assert all(0.5 <= row["probability"] <= 0.6 and row["judgement"]["reasoning"] for row in rows)
    assert any(row["probability"] == pytest.approx(0.6) for row in rows)
    assert len(last) == 3 and last[1]["content"] in {row["judgement"]["reasoning"] for row in rows}
    with serving() as service:
        free = stage("principled", service, tmp_path / "free", thinks=True, clamp=0.0).apply(ROWS)
    assert any(row["probability"] > 0.6 for row in free)


@pytest.mark.parametrize(("name", "more"), [("critique", {"rounds": 2}), ("principled", {"thinks": True})])
def test_a_service_that_misbehaves_changes_no_row(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    with serving() as service:
        expected = stage(name, service, tmp_path / "well", **more).apply(ROWS)
    kinds = cycle([*FAILURES, "well", "slow 0.01", "well"])
    with serving(lambda number, body: next(kinds)) as service:
        assert stage(name, service, tmp_path / "ill", retries=60, **more).apply(ROWS) == expected


@pytest.mark.parametrize(("name", "more"), [("critique", {"rounds": 2}), ("principled", {})])
def test_ended_in_the_middle_and_begun_again_it_asks_for_the_rest_and_gives_the_same(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    with serving() as service:
        expected = stage(name, service, tmp_path / "whole", **more).apply(ROWS)
        calls = service.answered
    with serving(lambda number, body: "well" if number < calls // 2 else "500") as service:
        with pytest.raises(RunFailed, match=r"has no answer about red:\d+: status 500(.|\n)*the same command goes on"):
            stage(name, service, tmp_path / "ended", retries=0, concurrency=2, **more).apply(ROWS)
        well, failed = calls // 2, service.answered - calls // 2
        service.behave = lambda number, body: "well"
        assert stage(name, service, tmp_path / "ended", **more).apply(ROWS) == expected
        assert service.answered == calls + failed and well, "what was answered is asked once"


def test_a_row_that_is_refused_is_told_and_the_others_stay(tmp_path: Path) -> None:
    with serving(lambda number, body: "400" if "lock 3?" in json.dumps(body) else "well") as service:
        found = stage("critique", service, tmp_path, rounds=1).apply(ROWS[:5])
    (dropped,) = (one for one in found if isinstance(one, Dropped))
    assert dropped.origin == "red:3" and dropped.reason == "the model gave no answer" and "400" in dropped.detail


def test_where_everything_is_refused_it_stops_instead_of_dropping_all(tmp_path: Path) -> None:
    with (
        serving(lambda number, body: "422") as service,
        pytest.raises(UserError, match=r"refused whatever it asks(.|\n)*body"),
    ):
        stage("critique", service, tmp_path).apply(ROWS)


def test_a_few_last_rows_that_are_all_refused_are_dropped_where_others_were_answered(tmp_path: Path) -> None:
    with serving(lambda number, body: "400" if re.search("lock [34]", json.dumps(body)) else "well") as service:
        critique = stage("critique", service, tmp_path, rounds=1)
        assert not any(isinstance(one, Dropped) for one in critique.apply(ROWS[:3]))
        assert all(isinstance(one, Dropped) for one in critique.apply(ROWS[3:5]))


def test_a_failure_may_cost_its_row_alone(tmp_path: Path) -> None:
    with serving(lambda number, body: "500" if "lock 3?" in json.dumps(body) else "well") as service:
        found = stage("critique", service, tmp_path, rounds=1, retries=1, failures="drop").apply(ROWS[:5])
    assert [isinstance(one, Dropped) for one in found] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("critique", {"model": ""}, "names no model"),
        ("critique", {"rounds": 0}, "revises nothing"),
        ("critique", {"cut": "maybe"}, "cut=maybe is unknown"),
        ("critique", {"constitution": "/no/such.yaml"}, "cannot be read"),
        ("answer", {"count": 0}, "asks for nothing"),
        ("answer", {"count": 2, "temperature": 0.0}, "the same answer"),
        ("principled", {"clamp": 0.5}, "leaves no choice"),
        ("principled", {"top_p": 0.0}, "is no share"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    name: str, more: dict[str, Any], told: str, service: Service, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        stage(name, service, tmp_path, **more)


def test_patience_and_money_make_no_other_job(service: Service, tmp_path: Path) -> None:
    made: Any = stage("critique", service, tmp_path)
    assert {"concurrency", "retries", "max_cost", "cache", "key_variable"} <= set(made.aside)
    assert not {"url", "model", "api", "body", "seed", "rounds", "temperature", "max_tokens"} & set(made.aside)


def test_a_page_shows_every_step_with_its_principle(service: Service, tmp_path: Path) -> None:
    critique = stage("critique", service, tmp_path, rounds=2)
    (row,) = critique.apply(ROWS[:1])
    shown = critique.page(row)
    for one in row["critiques"]["rounds"]:
        assert all(one[key] in shown for key in ("principle", "critique", "revision"))
    assert row["critiques"]["draft"] in shown and ROWS[0]["prompt"] in shown
    judge = stage("principled", service, tmp_path)
    (pair,) = judge.apply(ROWS[:1])
    assert pair["chosen"] in judge.page(pair) and f"{pair['probability']:.3f}" in judge.page(pair)
