"""Execution accuracy: prompts as in training, queries judged by what they return."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Row, Sampling
from loomtune.errors import Preempted, UserError
from loomtune.run import Run
from loomtune.settings import Settings
from loomtune.signals import StopRequest
from loomtune_plugins.evaluators import generation, sql_accuracy
from loomtune_plugins.evaluators.settings import SQLAccuracySettings
from loomtune_plugins.evaluators.sql_accuracy import SQLAccuracy

DATABASE = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x');"
EOS, TURN_END = 3, 4
SAMPLING = Sampling(max_tokens=1)


def row(completion: str, **more: str) -> Row:
    return {"prompt": f"Q{len(completion)}?", "completion": completion, "database": DATABASE} | more


class Letters:
    """A tokenizer of characters."""

    eos_id = EOS
    stops = (EOS, TURN_END)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int], *, special: bool = False) -> str:
        return "".join(chr(token) for token in tokens if token != EOS)


class Sft:
    """Asks with the prompt alone."""

    def prompt(self, row: Row, tokenizer: Letters) -> list[int]:
        return tokenizer.encode(row["prompt"])


class Alone:
    rank, size, replicas = 0, 1, 1

    def total(self, numbers: list[float]) -> list[float]:
        return list(numbers)


def a_run(rows: list[Row], answers: list[str], **more: Any) -> Any:
    """A run whose model answers so, one prompt after the other."""
    asked: list[tuple[list[list[int]], Sampling]] = []

    def generate(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        asked.append((prompts, sampling))
        return [[*Letters().encode(answer), EOS] for answer in answers]

    data = SimpleNamespace(splits=lambda: ("train", "test"), rows=lambda split: iter(rows))
    usual = {
        "rows": lambda split, limit: rows[:limit] if limit else rows,
        "generate": generate,
        "asked": asked,
        "objective": Sft(),
        "tokenizer": Letters(),
        "model": SimpleNamespace(context=lambda: 100),
        "data": data,
        "world": Alone(),
        "settings": Settings(),
        "stop": StopRequest(),
        "guards": [],
    }
    made = SimpleNamespace(**usual | more)
    made.heed = partial(Run.heed, made)
    return made


def accuracy(**settings: Any) -> SQLAccuracy:
    return SQLAccuracy(SQLAccuracySettings(**settings))


def test_queries_count_by_what_they_return() -> None:
    rows = [
        row("SELECT b FROM t WHERE a = 2"),
        row("SELECT COUNT(*) FROM t"),
        row("SELECT a FROM t"),
        row("SELECT b FROM t"),
    ]
    answers = ["SELECT t.b FROM t WHERE a > 1 AND a < 3", "SELECT COUNT(*) FROM t WHERE a > 1", "SELECT nothing", ""]
    assert accuracy().evaluate(a_run(rows, answers)) == {"sql_accuracy": 0.25, "sql_valid": 0.5}


@pytest.mark.parametrize(("right", "expected"), [("SELECT a FROM t order\nby a", 0.0), ("SELECT a FROM t", 1.0)])
def test_order_counts_where_it_was_asked_for(right: str, expected: float) -> None:
    assert accuracy().evaluate(a_run([row(right)], ["SELECT a FROM t ORDER BY a DESC"]))["sql_accuracy"] == expected


def test_the_model_is_asked_greedily_with_the_prompt_of_training() -> None:
    rows = [row("SELECT a FROM t"), row("SELECT b FROM t WHERE a = 1")]
    run = a_run(rows, ["", ""])
    accuracy(max_tokens=9).evaluate(run)
    ((prompts, sampling),) = run.asked
    assert [Letters().decode(prompt) for prompt in prompts] == [row["prompt"] for row in rows]
    assert sampling == Sampling(max_tokens=9, temperature=0.0, stop=(EOS, TURN_END))


def test_an_objective_that_learns_prompts_too_says_where_they_end() -> None:
    objective = SimpleNamespace(prompt=lambda row, tokenizer: [7, 8])
    run = a_run([row("SELECT a FROM t")], [""], objective=objective)
    accuracy().evaluate(run)
    assert run.asked[0][0] == [[7, 8]]


def test_a_row_that_is_too_long_to_ask_is_wrong_and_the_others_keep_their_answers() -> None:
    rows = [row("SELECT a FROM t"), row("SELECT b FROM t", prompt="x" * 200), row("SELECT COUNT(*) FROM t")]
    found = accuracy().evaluate(a_run(rows, ["SELECT a FROM t", "SELECT COUNT(*) FROM t"]))
    assert found == {"sql_accuracy": pytest.approx(2 / 3), "sql_valid": pytest.approx(2 / 3)}


def test_each_rank_executes_its_share() -> None:
    rows = [row("SELECT a FROM t"), row("SELECT b FROM t"), row("SELECT a, b FROM t")]
    answers = ["SELECT a FROM t", "wrong", "SELECT a, b FROM t"]
    shares: list[list[float]] = []

    class Rank(Alone):
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def total(self, numbers: list[float]) -> list[float]:
            shares.append(list(numbers))
            return list(numbers)

    for rank in (0, 1):
        accuracy().evaluate(a_run(rows, answers, world=Rank(rank)))
    assert [share for share in shares if len(share) == 2] == [[2, 2], [0, 0]]


def test_at_most_so_many_rows_are_measured() -> None:
    rows = [row("SELECT a FROM t")] * 5
    run = a_run(rows, ["SELECT a FROM t"] * 2)
    assert accuracy(rows=2).evaluate(run)["sql_accuracy"] == 1.0


def test_prompts_are_asked_in_rounds_between_which_a_request_to_stop_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ROUND", 2)
    rows = [row("SELECT a FROM t"), row("SELECT b FROM t WHERE 1"), row("SELECT COUNT(*) FROM t")]
    run = a_run(rows, [])
    whole = run.generate

    def generate(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        whole(prompts, sampling)
        return [prompt[1:] for prompt in prompts]

    run.generate = generate
    assert generation.generated(run, [[1, 5], [2, 6], [3, 7]], SAMPLING).send(None) == [5]
    assert [*generation.generated(run, [[1, 5], [2, 6], [3, 7]], SAMPLING)] == [[5], [6], [7]]
    assert [prompts for prompts, _ in run.asked[1:]] == [[[1, 5], [2, 6]], [[3, 7]]]
    run.world = SimpleNamespace(replicas=2, total=Alone().total)
    assert len([*generation.generated(run, [[1, 5], [2, 6], [3, 7]], SAMPLING)]) == 3 and len(run.asked) == 4
    run.stop.asked = True
    with pytest.raises(Preempted):
        accuracy().evaluate(run)
    assert len(run.asked) == 4


def test_a_request_to_stop_is_heard_while_queries_are_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    run, executed = a_run([row("SELECT a FROM t")] * 3, ["SELECT a FROM t"] * 3), []

    def executes(*given: Any, **how: Any) -> bool:
        executed.append(given)
        run.stop.asked = True
        return True

    monkeypatch.setattr(sql_accuracy, "executes_same", executes)
    with pytest.raises(Preempted):
        accuracy().evaluate(run)
    assert len(executed) == 2, "the first row's query, beside the right one and by itself"


@pytest.mark.parametrize(
    ("rows", "split", "said"),
    [([row("SELECT 1")], "tests", "Did you mean 'test'"), ([{"prompt": "?", "completion": "x"}], "test", "database")],
)
def test_data_without_what_is_measured_are_refused(rows: list[Row], split: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        accuracy(split=split).evaluate(a_run(rows, [""]))
