"""Conversations, however a file writes them down: as messages that chat templates read, or a word about what is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loomtune_plugins.data.text import decoded
from loomtune_plugins.data.values import RecordError, kind, listed, text

SHAREGPT = "conversations"
"""The column in which ShareGPT keeps what others call `messages`."""

ROLES = ("system", "developer", "user", "assistant", "tool")

_SPEAKERS = {name: name for name in ROLES} | {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names of those who speak, and the usual ones, which many such files have."""

_CALL = "function_call"
"""As which the assistant speaks where it calls a tool."""


def spoken(value: Any, where: str) -> str | list[dict[str, Any]]:
    """Text, or a list of messages. Raises RecordError."""
    return conversation(value, where) if isinstance(value, list) else text(value, where)


def conversation(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read. Raises RecordError."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecordError(f"{where} is {kind(value)}, not a list of messages")
    return [_turn(turn, f"{where} message {count}") for count, turn in enumerate(value, start=1)]


def apart(chosen: Any, rejected: Any) -> dict[str, Any]:
    """A prompt, which is what two conversations begin with, and what of each comes after. Raises RecordError."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise RecordError(
            "has no prompt: 'chosen' and 'rejected' are not both conversations, which would begin with it"
        )
    pairs = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(chosen[:-1], rejected[:-1], strict=False))
    if not (prompt := [turn for turn, _ in pairs]):
        raise RecordError("has no prompt: 'chosen' and 'rejected' do not begin with the same message")
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """One message. Who speaks is always one of few: a template may leave out in silence what another says."""
    if not isinstance(turn, Mapping):
        raise RecordError(f"{where} is {kind(turn)}, not an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _translated(message, where)
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_parts(message["content"], where))
    for key in ("role", "content"):
        if not isinstance(message.get(key), str) and not (key == "content" and "tool_calls" in message):
            raise RecordError(f"{where} has {kind(message.get(key))} as its {key}, not text")
    if message["role"] not in ROLES:
        raise _unknown(where, "role", message["role"], ROLES)
    return message


def _translated(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ShareGPT's `from` and `value`, as role and content, or as a call."""
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, said = message["from"], message.get("value")
    if speaker == _CALL:
        return {**rest, "role": "assistant", "tool_calls": _calls(text(said, f"{where}, a {_CALL},"), where)}
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise _unknown(where, "speaker", speaker, (*_SPEAKERS, _CALL))
    return {**rest, "role": _SPEAKERS[speaker], "content": said}


def _calls(said: str, where: str) -> list[dict[str, Any]]:
    """The calls that some JSON is: `{"name": ..., "arguments": ...}`, or a list of such."""
    try:
        value = decoded(said)
    except RecordError as error:
        raise RecordError(f"{where}, a {_CALL}, {error}", error.reason) from error
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise RecordError(f"{where}, a {_CALL}, is no object with name and arguments")
    own = ("name", "arguments")
    return [{"type": "function", "function": {key: call[key] for key in own if key in call}} for call in calls]


def _parts(content: Sequence[Any], where: str) -> Iterator[str]:
    """Texts of a message in parts, which templates write one behind the other, with nothing between."""
    for count, part in enumerate(listed(content, where), start=1):
        named = part.get("type", "an object without a type") if isinstance(part, Mapping) else kind(part)
        if named != "text" or isinstance(part, str):
            raise RecordError(f"{where} has {named!s:.80} as its part {count}, and only parts of text are read")
        yield text(part.get("text"), f"{where} part {count}")


def _unknown(where: str, what: str, name: Any, known: Sequence[str]) -> RecordError:
    told = repr(name) if isinstance(name, str) else kind(name)
    return RecordError(f"{where} has the {what} {told:.80}, which is none of {', '.join(known)}")
