"""A tree of messages: who said what to whom, and which replies people ranked above which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune_plugins.data.ordered import Answer
from loomtune_plugins.data.values import RecordError, keys, kind, listed, number, text

_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Message:
    """What was said, and the replies to it that are kept. rank: 0 is the best; None where nobody ranked it."""

    role: str
    said: str
    rank: float | None
    replies: Sequence[Message]

    @property
    def turn(self) -> dict[str, Any]:
        """In the form that chat templates read."""
        return {"role": self.role, "content": self.said}

    @property
    def ranked(self) -> list[Answer]:
        """The assistant's replies that somebody ranked."""
        return [
            Answer(reply.said, -reply.rank)
            for reply in self.replies
            if reply.role == "assistant" and reply.rank is not None
        ]

    def best(self) -> Message | None:
        """The best-ranked reply; where there are no ranks, the first."""
        return min(self.replies, key=lambda reply: float("inf") if reply.rank is None else reply.rank, default=None)


def read_tree(record: Mapping[str, Any], lang: str) -> Message | None:
    """The tree's first message; None where that one is left out. Raises RecordError where it is no such tree."""
    if "prompt" not in record:
        is_message = "parent_id" in record or "role" in record
        found = "it is a single message" if is_message else f"it has {keys(record)}"
        raise RecordError(f"has no 'prompt', with which a conversation tree begins; {found}")
    return _message(record["prompt"], lang)


def _message(value: Any, lang: str) -> Message | None:
    if not isinstance(value, Mapping):
        raise RecordError(f"a message is {kind(value)}, not an object")
    where = f"message {value.get('message_id', '(without message_id)')}"
    role = value.get("role")
    if role not in _ROLES:
        raise RecordError(f"{where} has the role {role!r}, which is neither prompter nor assistant")
    said, rank = text(value.get("text"), f"{where}: 'text'"), value.get("rank")
    replies = listed(value.get("replies") or [], f"{where}: 'replies'")
    if _is_left_out(value, lang):
        return None
    kept = [reply for reply in (_message(reply, lang) for reply in replies) if reply is not None]
    return Message(_ROLES[role], said, None if rank is None else number(rank, f"{where}: 'rank'"), kept)


def _is_left_out(value: Mapping[str, Any], lang: str) -> bool:
    """Deleted, written by a model, rejected by review, or in another language."""
    marked = bool(value.get("deleted")) or bool(value.get("synthetic")) or value.get("review_result") is False
    return marked or bool(lang and value.get("lang") != lang)


def asked(root: Message) -> Iterator[tuple[list[dict[str, Any]], Message]]:
    """(conversation so far, message) of every message that an assistant may reply to, from the first on."""
    waiting: list[tuple[list[dict[str, Any]], Message]] = [([], root)]
    while waiting:
        before, message = waiting.pop()
        path = [*before, message.turn]
        if message.role == "user":
            yield path, message
        waiting += [(path, reply) for reply in reversed(message.replies)]


def best_path(root: Message) -> list[dict[str, Any]]:
    """The conversation of best-ranked messages, up to the assistant's last turn; empty where nobody replied."""
    path, message = list[dict[str, Any]](), root
    while True:
        path.append(message.turn)
        following = message.best()
        if following is None:
            break
        message = following
    while path and path[-1]["role"] != "assistant":
        path.pop()
    return path
