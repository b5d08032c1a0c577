"""Talking to a model: prompts become rows of the run's own form."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.contracts import Sampling
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.commands import chat

TEXT = ToyTokenizer()


class Parrot:
    """A run whose model repeats its prompt and ends. asked: the rows that prompts became."""

    step = 3
    tokenizer = TEXT

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.data = SimpleNamespace(rows=lambda split: rows)
        self.objective = SimpleNamespace(prompt=self._prompt)
        self.asked: list[Any] = []

    def _prompt(self, row: Any, tokenizer: Any) -> list[int]:
        self.asked.append(row)
        return TEXT.encode(row["messages"][0]["content"] if "messages" in row else row["prompt"])

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        return [[*prompt, TEXT.eos_id][: sampling.max_tokens] for prompt in prompts]


SAMPLING = Sampling(max_tokens=20, stop=(TEXT.eos_id,))


def test_a_reply_is_the_completion_without_its_end() -> None:
    assert chat.reply(Parrot({"prompt": "p", "completion": "c"}), "warp", SAMPLING) == "warp"


def test_a_reply_ends_where_the_template_ends_a_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Turns(ToyTokenizer):
        stops = (ToyTokenizer.eos_id, TEXT.encode("!")[0])

    run = Parrot({"prompt": "p", "completion": "c"})
    run.tokenizer, answered = Turns(), []

    def generate(prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        answered.append(sampling.stop)
        return [[*prompt, sampling.stop[-1]] for prompt in prompts]

    run.generate = generate  # type: ignore[method-assign]
    monkeypatch.setattr(chat, "opened", contextmanager(lambda plan, folder: iter([run])))
    monkeypatch.setattr(chat.api, "resumed", lambda folder, overrides: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("warp\n"))
    chat.chat([str(tmp_path)])
    assert answered == [Turns.stops] and capsys.readouterr().out == "warp\n"


def test_a_prompt_is_asked_in_the_form_of_the_rows() -> None:
    plain, talk = Parrot({"prompt": "p", "completion": "c"}), Parrot({"messages": []})
    chat.reply(plain, "warp", SAMPLING), chat.reply(talk, "warp", SAMPLING)
    assert plain.asked[0]["prompt"] == "warp"
    assert talk.asked[0]["messages"][0] == {"role": "user", "content": "warp"}
    assert talk.asked[0]["messages"][-1]["role"] == "assistant"


def test_each_line_of_input_is_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Parrot({"prompt": "p", "completion": "c"})

    @contextmanager
    def opened(plan: Any, folder: Path) -> Iterator[Any]:
        yield run

    monkeypatch.setattr(chat, "opened", opened)
    monkeypatch.setattr(chat.api, "resumed", lambda folder, overrides: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("warp\\nweft\nreed\n"))
    assert chat.chat([str(tmp_path), "--max-tokens", "30"]) == 0
    assert capsys.readouterr().out == "warp\nweft\nreed\n"
    assert [row["prompt"] for row in run.asked] == ["warp\nweft", "reed"]
