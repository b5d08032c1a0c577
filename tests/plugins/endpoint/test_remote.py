"""Asking a service that does all that services do."""

from __future__ import annotations

import json
import math
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.endpoint import Ask, Client, EndpointSettings, opened
from services import FAILURES, serving

QUICK: dict[str, Any] = {"first_wait": 0.01, "longest_wait": 1.0, "connect_seconds": 2.0, "silent_seconds": 1.0}


def client(url: str, folder: Path, **more: Any) -> Client:
    settings = {"url": url, "model": "m", "cache": str(folder), **QUICK, **more}
    return opened(EndpointSettings(**settings), "stage.x")


def asks(count: int, **more: Any) -> list[Ask]:
    return [Ask(messages=[{"role": "user", "content": f"question {n}"}], **more) for n in range(count)]


def test_every_question_is_answered_in_order_and_no_more_are_under_way_than_may_be(tmp_path: Path) -> None:
    with serving(lambda number, body: "slow 0.02") as service:
        replies = client(service.url, tmp_path, concurrency=4).answer(asks(20))
    assert len({reply.text for reply in replies}) == 20 and not any(reply.failed for reply in replies)
    assert 2 <= service.most <= 4
    assert replies[3].tokens == (100, 10)


@pytest.mark.parametrize("failure", [*FAILURES, "cut json", "silent", "trickle"])
def test_a_failed_attempt_is_followed_by_another(failure: str, tmp_path: Path) -> None:
    limits = {"silent_seconds": 0.3, "answer_seconds": 0.5}
    with serving(lambda number, body: "well" if number else failure) as service:
        replies = client(service.url, tmp_path, **limits).answer(asks(1))
        assert replies[0].text.startswith("answer ") and not replies[0].failed
        assert service.answered == 2


@pytest.mark.parametrize("failure", ["500", "disconnect", "half", "no json", "silent"])
def test_what_fails_for_good_says_why_and_is_asked_anew_by_the_next_call(failure: str, tmp_path: Path) -> None:
    sick = [True]
    with serving(lambda number, body: failure if sick[0] else "well") as service:
        asked = client(service.url, tmp_path, retries=1, silent_seconds=0.2)
        (reply,) = asked.answer(asks(1))
        assert reply.failed and not reply.refused and not reply.text
        sick[0] = False
        assert not asked.answer(asks(1))[0].failed


def test_a_service_that_is_down_is_not_tried_question_by_question(tmp_path: Path) -> None:
    with serving(lambda number, body: "503") as service:
        replies = client(service.url, tmp_path, retries=2, concurrency=2).answer(asks(50))
        assert all("503" in reply.failed for reply in replies)
        assert service.answered <= 12, "some questions are tried in full, some once, and the others not at all"


def test_a_question_that_always_fails_does_not_cost_the_others_their_answers(tmp_path: Path) -> None:
    with serving(lambda number, body: "500" if "question 0" in json.dumps(body) else "well") as service:
        replies = client(service.url, tmp_path, retries=2, concurrency=1).answer(asks(5))
    assert [bool(reply.failed) for reply in replies] == [True, False, False, False, False]


def test_nobody_listening_is_told(tmp_path: Path) -> None:
    with serving() as service:
        url = service.url
    assert "Connect" in client(url, tmp_path, retries=1).answer(asks(1))[0].failed


def test_a_crowd_of_failures_loses_nothing(tmp_path: Path) -> None:
    kinds = cycle([*FAILURES, "well", "well"])
    with serving(lambda number, body: next(kinds)) as service:
        replies = client(service.url, tmp_path, retries=40, longest_wait=0.05).answer(asks(30))
    assert len({reply.text for reply in replies}) == 30 and not any(reply.failed for reply in replies)


def test_retry_after_is_heeded_by_all(tmp_path: Path) -> None:
    with serving(lambda number, body: "well" if number else "429") as service:
        service.retry_after = "0.4"
        client(service.url, tmp_path, concurrency=1).answer(asks(3))
        waits = [later - service.times[0] for later in service.times[1:]]
    assert all(wait >= 0.4 for wait in waits)


def test_a_service_that_wants_to_be_left_alone_for_an_hour_has_failed(tmp_path: Path) -> None:
    with serving(lambda number, body: "429") as service:
        service.retry_after = "3600"
        began = time.monotonic()
        (reply,) = client(service.url, tmp_path).answer(asks(1))
    assert "429" in reply.failed and time.monotonic() - began < 60


@pytest.mark.parametrize("status", ["401", "403", "404", "302"])
def test_what_no_question_would_mend_ends_at_once(status: str, tmp_path: Path) -> None:
    with (
        serving(lambda number, body: status) as service,
        pytest.raises(UserError, match=rf"stage\.x\.url answers with status {status}"),
    ):
        client(service.url, tmp_path, concurrency=1).answer(asks(20))
    assert service.answered == 1


def test_a_refused_question_is_refused_alone(tmp_path: Path) -> None:
    with serving(lambda number, body: "400" if "question 1" in json.dumps(body) else "well") as service:
        replies = client(service.url, tmp_path).answer(asks(3))
    assert [reply.refused for reply in replies] == [False, True, False]
    assert "status 400" in replies[1].failed
    assert service.answered == 3


def test_an_empty_answer_is_tried_once_more_and_then_refused(tmp_path: Path) -> None:
    with serving(lambda number, body: "no text") as service:
        (reply,) = client(service.url, tmp_path, retries=6).answer(asks(1))
    assert reply.refused and "empty" in reply.failed and service.answered == 2


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    with serving() as service:
        first = client(service.url, tmp_path).answer(asks(5))
        again = client(service.url, tmp_path)
        assert again.answer(asks(6))[:5] == first
        assert (again.asked, service.answered) == (1, 6)
        again.answer(asks(1, draw=1))
        again.answer(asks(1, temperature=0.5))
        assert service.answered == 8, "another draw and another request are other questions"


def test_a_question_that_is_asked_twice_at_once_is_sent_once(tmp_path: Path) -> None:
    with serving() as service:
        one, other = client(service.url, tmp_path).answer([*asks(1), *asks(1)])
    assert one == other and service.answered == 1


@pytest.mark.parametrize("left", [b'{"key": "a', b"\n\nnothing\n", b"[1, 2]\n", b'{"key": 3, "cost": "x", "reply": 0}'])
def test_what_a_kill_left_of_a_line_does_no_harm(left: bytes, tmp_path: Path) -> None:
    with serving() as service:
        first = client(service.url, tmp_path).answer(asks(2))
        with (tmp_path / "answers.jsonl").open("ab") as file:
            file.write(left)
        assert client(service.url, tmp_path).answer(asks(3))[:2] == first
        assert client(service.url, tmp_path).answer(asks(3))[:2] == first
        assert service.answered == 3


def test_asking_ends_where_the_cap_is_reached_and_keeps_what_was_paid(tmp_path: Path) -> None:
    prices = {"input_price": 1000.0, "output_price": 10_000.0}  # 0.2 an answer
    with serving() as service:
        with pytest.raises(UserError, match=r"max_cost=1 is reached: .* cost 1\.0") as raised:
            client(service.url, tmp_path, concurrency=1, max_cost=1.0, **prices).answer(asks(20))
        assert "raise stage.x.max_cost" in str(raised.value)
        assert service.answered == 5
        client(service.url, tmp_path, concurrency=1, max_cost=10.0, **prices).answer(asks(20))
        assert service.answered == 20, "the five are not paid again"


def test_answers_of_no_use_count_too(tmp_path: Path) -> None:
    prices = {"input_price": 1000.0, "output_price": 10_000.0}
    with serving(lambda number, body: "no choices" if number == 0 else "well") as service:
        paid = client(service.url, tmp_path, **prices)
        paid.answer(asks(1))
        assert math.isclose(paid.answers.cost, 0.4)


def test_the_key_is_sent_and_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOMTUNE_API_KEY", "sk-secret-1")
    with serving(lambda number, body: "well" if number else "400") as service:
        replies = client(service.url, tmp_path, concurrency=1).answer(asks(2))
    assert service.headers[0]["Authorization"] == "Bearer sk-secret-1"
    assert "***" in replies[0].failed and "sk-secret" not in replies[0].failed
    assert b"sk-secret" not in (tmp_path / "answers.jsonl").read_bytes()


def test_a_message_that_is_cut_within_the_key_shows_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-secret-" + "0123456789" * 40
    monkeypatch.setenv("LOOMTUNE_API_KEY", key)
    with serving(lambda number, body: "400") as service:
        (reply,) = client(service.url, tmp_path, retries=0).answer(asks(1))
    assert "***" in reply.failed and "0123456789" not in reply.failed


def test_being_asked_to_leave_ends_the_asking(tmp_path: Path) -> None:
    leaves = [False]

    def behave(number: int, body: dict[str, Any]) -> str:
        leaves[0] = number >= 2
        return "well"

    with serving(behave) as service:
        asked = client(service.url, tmp_path, concurrency=1)
        with pytest.raises(UserError, match="asked to leave"):
            asked.answer(asks(20), lambda: leaves[0])
        assert service.answered == 3
        assert not any(reply.failed for reply in asked.answer(asks(3))) and service.answered == 3, "they are kept"


def test_the_address_of_a_service_of_this_machine_is_one() -> None:
    for url in ("http://[::1]:8000/v1", "http://h", "https://a.b-c:443/v1/", "http://10.0.0.1:8/x/y"):
        opened(EndpointSettings(url=url, model="m"), "stage.x")


def test_a_key_in_the_settings_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="key_variable is no name") as raised:
        client("http://localhost:1/v1", tmp_path, key_variable="sk-secret-1")
    assert "secret" not in str(raised.value)
    with pytest.raises(UserError, match="user or a password"):
        client("http://me:secret@localhost:1/v1", tmp_path)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_log_probabilities_of_options_are_those_of_the_tokens_that_spell_them(api: str, tmp_path: Path) -> None:
    with serving() as service:
        (reply,) = client(service.url, tmp_path, api=api).answer(asks(1, options=("A", "B")))
    (body,) = service.bodies
    assert body["max_tokens"] == 1 and body["temperature"] == 1.0
    assert set(reply.log_probs) == {"A", "B"} and all(-4 < value < 0 for value in reply.log_probs.values())


def test_completions_are_plain_text_that_ends_where_another_turn_begins(tmp_path: Path) -> None:
    with serving() as service:
        (reply,) = client(service.url, tmp_path, api="completions").answer(asks(1))
    assert service.bodies[0]["prompt"] == "Human: question 0\n\nAssistant:"
    assert reply.text.startswith("answer ") and "Human" not in reply.text


def test_more_of_a_request_goes_along_and_null_takes_out(tmp_path: Path) -> None:
    with serving() as service:
        client(service.url, tmp_path, body={"seed": 3, "top_p": None}).answer(asks(1))
    assert service.bodies[0]["seed"] == 3 and "top_p" not in service.bodies[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": ""}, "model names no model"),
        ({"api": "chatt"}, "api=chatt is unknown"),
        ({"url": "localhost:8000"}, "is no address"),
        ({"concurrency": 0}, "concurrency=0 is less than 1"),
        ({"answer_seconds": 0.0}, "leaves no time"),
        ({"max_cost": 1.0}, "counts by prices"),
        ({"max_cost": 1.0, "input_price": 1.0, "cache": ""}, "none is named"),
        ({"url": "", "input_price": 1.0}, "without effect"),
        ({"url": "", "retries": 2}, r"retries would be without effect"),
        ({"chat_template": "plain"}, "without effect"),
        ({"batch": 4}, r"batch would be without effect"),
        ({"url": "http://h:port/v1"}, "is no address"),
        ({"url": "http://h/v1?version=1"}, "is no address"),
        ({"url": "http://[::1/v1"}, "is no address"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        opened(EndpointSettings(**{"url": "http://h/v1", "model": "m", "cache": str(tmp_path), **settings}), "stage.x")
