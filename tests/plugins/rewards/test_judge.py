"""A language model scores answers; whatever else it does is no score."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Answer
from loomtune.errors import Preempted, UserError
from loomtune_plugins.rewards.judge import Judge
from loomtune_plugins.rewards.judge_settings import JudgeSettings
from loomtune_plugins.rewards.judge_words import filled, from_json, number
from services import Behave, Service, serving

Answered = Callable[..., list[Answer]]
QUICK: dict[str, Any] = {"model": "m", "first_wait": 0.01, "longest_wait": 0.1, "retries": 1}


def judge(url: str, folder: Path, **settings: Any) -> Judge:
    return Judge(JudgeSettings(**{"url": url, "cache": str(folder), **QUICK, **settings}))


def says(**words: str) -> Behave:
    """What is said of each answer, by a word that is in it."""

    def behave(number: int, body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"]
        return next((said for word, said in words.items() if word in asked), "say Score: 1")

    return behave


def asked(service: Service) -> list[str]:
    return [body["messages"][-1]["content"] for body in service.bodies]


def test_the_number_it_names_becomes_a_score_between_0_and_1(run: Any, answered: Answered, tmp_path: Path) -> None:
    with serving(says(apple="say Nice. Score: 10", pear="say **Score:** 5.5/10")) as service:
        scores = judge(service.url, tmp_path).score(run, answered(["an apple", "a pear", "a stone"]))
    assert scores == [1.0, 0.5, 0.0] and not run.told
    for shown in ("?", "an apple", "from 1 (worst) to 10 (best)"):
        assert shown in "".join(asked(service))


def test_what_has_no_score_is_left_out_and_told(run: Any, answered: Answered, tmp_path: Path) -> None:
    behave = says(apple="say Score: 10", pear="say I like it", stone="say Score: 11", void="400", slow="500")
    with serving(behave) as service:
        scores = judge(service.url, tmp_path).score(run, answered(["apple", "pear", "stone", "void", "slow"]))
    assert scores[0] == 1.0 and all(map(math.isnan, scores[1:]))
    told = "\n".join(run.told)
    assert len(run.told) == 3 and "'I like it'" in told and "out of bounds: 11" in told and "gives no answer" in told


def test_a_judge_that_nobody_may_ask_ends_the_run(run: Any, answered: Answered, tmp_path: Path) -> None:
    with serving(lambda number, body: "401") as service, pytest.raises(UserError, match="status 401"):
        judge(service.url, tmp_path).score(run, answered(["a", "b"]))


def test_the_same_answer_is_paid_for_once(run: Any, answered: Answered, tmp_path: Path) -> None:
    with serving(says(apple="say Score: 10")) as service:
        for _ in range(2):
            assert judge(service.url, tmp_path).score(run, answered(["apple", "apple"])) == [1.0, 1.0]
        assert service.answered == 1


def test_each_criterion_is_asked_by_itself(run: Any, answered: Answered, tmp_path: Path) -> None:
    criteria = ["Is it kind?", "Is it true?"]
    with serving(says(kind="say Score: 10", true="say Score: 1")) as service:
        scores = judge(service.url, tmp_path, criteria=criteria).score(run, answered(["x", "y"]))
    assert scores == [0.5, 0.5] and service.answered == 4


def test_json_and_choices_are_read(run: Any, answered: Answered, tmp_path: Path) -> None:
    with serving(says(x='say {"why": "so", "score": 4}')) as service:
        settings = {"read": "json", "lowest": 0.0, "highest": 5.0, "system": "You judge."}
        assert judge(service.url, tmp_path / "1", **settings).score(run, answered(["x"])) == [0.8]
        assert service.bodies[0]["messages"][0] == {"role": "system", "content": "You judge."}
    with serving() as service:
        (score,) = judge(service.url, tmp_path / "2", read="choice").score(run, answered(["x"]))
    assert 0.05 < score < 0.95 and score != 0.5 and "(A) yes" in asked(service)[0]


def test_a_template_of_ones_own_shows_the_row(run: Any, answered: Answered, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Right: {row.gold}. Said: {completion}. {}, {other}")
    with serving(says()) as service:
        reward = judge(service.url, tmp_path, template=f"{tmp_path}/mine.txt")
        reward.score(run, answered(["{prompt}"], gold=7) + answered(["z"], gold=9))
        assert sorted(asked(service)) == ["Right: 7. Said: {prompt}. {}, {other}", "Right: 9. Said: z. {}, {other}"]
        with pytest.raises(UserError, match="lacks what"):
            judge(service.url, tmp_path, template="{completion} {row.depth}").score(run, answered(["x"]))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 7.0),
        ("7", 7.0),
        ("It has 3 faults. Score: 4", 4.0),
        ("score = 2, no: Score: 3.5", 3.5),
        ("Score: -1", -1.0),
        ("3 of 4", None),
        ("Score (1-10): 7", None),
        ("Score [1-10]: 7", None),
        ("none", None),
        ("", None),
    ],
)
def test_a_number_is_found_where_it_is_clear_which(text: str, score: float | None) -> None:
    assert number(text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('```json\n{"score": 3}\n```', 3.0),
        ('{"score": "4"}', 4.0),
        ('{"score": true}', None),
        ('{"scores": 3}', None),
        ("{", None),
        ("{" * 100_000 + "}", None),
        ('{"score": 1e999}', math.inf),
        ("[]", None),
    ],
)
def test_a_score_is_read_from_json(text: str, score: float | None) -> None:
    assert from_json(text) == score


def test_what_an_answer_says_is_not_filled_in_again() -> None:
    answer = Answer({"gold": "{completion}"}, [], [], "{criterion}", True)
    known = {"prompt": "p", "completion": answer.text, "criterion": "c", "lowest": "1", "highest": "9"}
    assert filled("{row.gold} {completion}", known, answer) == "{completion} {criterion}"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"read": "stars"}, "no way to read"),
        ({"template": "How good?"}, "does not show the answer"),
        ({"template": "{completion}?", "criteria": ["kind"]}, "does not ask about them"),
        ({"template": "nowhere.txt"}, "no file"),
        ({"read": "choice", "highest": 5.0}, r"highest would be without effect"),
        ({"read": "choice", "max_tokens": 9}, r"max_tokens would be without effect"),
        ({"lowest": 3.0, "highest": 3.0}, "lowest"),
        ({"model": ""}, r"reward\.judge\.model"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        judge("http://127.0.0.1:9/v1", tmp_path, **settings)


def test_a_template_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"{completion} \xff")
    with pytest.raises(UserError, match="no file that can be read"):
        judge("http://127.0.0.1:9/v1", tmp_path, template=f"{tmp_path}/mine.txt")


def test_a_template_that_shows_what_rows_lack_is_refused_before_the_run(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(rows=lambda split: [{"prompt": "?", "gold": "3"}])
    shows = "{completion} {row.%s}"
    judge("http://127.0.0.1:9/v1", tmp_path, template=shows % "gold").check(data)
    with pytest.raises(UserError, match=r"row\.depth.*(.|\n)*prompt, gold"):
        judge("http://127.0.0.1:9/v1", tmp_path, template=shows % "depth").check(data)


def test_asked_to_leave_it_asks_no_more(run: Any, answered: Answered, tmp_path: Path) -> None:
    def behave(number: int, body: dict[str, Any]) -> str:
        run.stop.requested = True
        return "say Score: 3"

    with serving(behave) as service:
        with pytest.raises(Preempted):
            judge(service.url, tmp_path, concurrency=1).score(run, answered(list("abcdefgh")))
        assert service.answered == 1


def test_answers_that_cannot_be_kept_leave_no_other_rank_waiting(run: Any, answered: Answered, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[Any] = []

    def gather(share: Any) -> list[Any]:
        told.append(share)
        return [share]

    run.world.gather = gather
    with serving() as service, pytest.raises(UserError, match="cannot be kept"):
        judge(service.url, tmp_path / "file").score(run, answered(["a", "b"]))
    assert len(told) == 1


def test_it_can_be_sent_to_another_process(run: Any, answered: Answered, tmp_path: Path) -> None:
    with serving(says()) as service:
        reward = judge(service.url, tmp_path)
        reward.score(run, answered(["x"]))
        sent = pickle.loads(pickle.dumps(reward))
        assert json.dumps(sent.score(run, answered(["x"]))) == "[0.0]" and service.answered == 1
