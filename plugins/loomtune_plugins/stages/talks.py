"""Rows as conversations: what is to be answered, the answer, and the row with another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from loomtune.contracts import Dropped, Row
from loomtune.contracts.data import identity
from loomtune.seeds import derive
from loomtune_plugins.endpoint import Message

ANSWERS = ("completion", "chosen", "rejected", "answers", "ranks", "scores", "label", "text")
"""What a row may say beside its prompt."""


@dataclass(slots=True)
class Talk:
    """A row on its way through a stage.

    turns: what is to be answered. answers: that were given. dropped: why it goes no further; None where it does.
    notes: what a stage made of it.
    """

    row: Row
    turns: Sequence[Message]
    answers: list[str]
    dropped: Dropped | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, row: Row) -> Talk:
        """A row's. One that asks nothing, or whose turns are no plain text, is dropped."""
        said = row.get("messages", row.get("prompt"))
        turns = [{"role": "user", "content": said}] if isinstance(said, str) else list(said or ())
        answers = _answers(row)
        if "messages" in row:
            asked = turns
            while asked and asked[-1].get("role") == "assistant":
                asked = asked[:-1]
            answers, turns = [str(one.get("content") or "") for one in turns[len(asked) :]][-1:], asked
        talk = cls(row, [_plain(one) for one in turns], [one for one in answers if one.strip()])
        if not turns or turns[-1].get("role") != "user" or not talk.turns[-1]["content"].strip():
            talk.drop("asks nothing", "")
        elif row.get("tools") or any("tool_calls" in one or one.get("role") == "tool" for one in turns):
            talk.drop("a conversation with tools", "")
        return talk

    def drop(self, reason: str, detail: str) -> None:
        """Ends its way."""
        self.dropped = Dropped(str(self.row.get("origin", "")), reason, detail, self.row)

    def draw(self, seed: int, *what: object) -> int:
        """A number below 2^63, of what the row says, never of its place or its company."""
        return derive(seed, blake2b(identity(self.row), digest_size=16).hexdigest(), *what)

    def answered(self, answer: str, **more: Any) -> Row:
        """The row with one answer, in the form that it came in, and what rides along."""
        rest = {key: value for key, value in self.row.items() if key not in ANSWERS}
        if "messages" in rest:
            return {**rest, "messages": [*self.turns, {"role": "assistant", "content": answer}], **more}
        spoken = isinstance(rest["prompt"], str)
        said = answer if spoken else [{"role": "assistant", "content": answer}]
        return {**rest, "completion": said, **more}

    def prompted(self, **more: Any) -> Row:
        """The row as a prompt alone, and what rides along."""
        rest = {key: value for key, value in self.row.items() if key not in (*ANSWERS, "messages", "prompt")}
        spoken = isinstance(self.row.get("prompt"), str)
        return {"prompt": self.row["prompt"] if spoken else list(self.turns), **rest, **more}

    def said(self, answer: str) -> Any:
        """An answer beside a prompt of this row's form."""
        return answer if isinstance(self.row.get("prompt"), str) else [{"role": "assistant", "content": answer}]


def _plain(turn: Mapping[str, Any]) -> Message:
    return {"role": str(turn.get("role", "")), "content": str(turn.get("content") or "")}


def _answers(row: Row) -> list[str]:
    """All answers of a row with a prompt, as text."""
    said = [row["completion"]] if row.get("completion") is not None else list(row.get("answers") or ())
    said += [row[key] for key in ("chosen", "rejected") if row.get(key) is not None]
    return [one if isinstance(one, str) else "\n".join(str(turn.get("content") or "") for turn in one) for one in said]
