"""Conversations as a chat template writes them, and what of the text the assistant said.

That is found by comparing renderings, with and without a turn, never by looking for markers: any template will do that
writes a conversation from front to back. What it writes is held against what was said: a template that leaves something
out, changes it or moves it is refused, since nobody would see from the loss that it had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune.contracts import Row, Tokenizer
from loomtune.errors import UserError

Message = Mapping[str, Any]

CURE = "set model.chat_template to one that writes it, or leave such rows out"
LAST = "; with objective.turns=last only the last answer has to be"
CERTAIN = 32
"""Characters of what no template has of itself."""

_SYSTEM = ("system", "developer")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_THOUGHTS = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text. learned: whether its tokens are to be predicted."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and the tools that the assistant may call, as templates read them."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, row: Row, system: str = "") -> Conversation:
        """A row's. system: what comes before a conversation that has no system prompt.

        Raises ValueError where tools, or the arguments of a call, are not what they should be.
        """
        messages = [_called(message) for message in row["messages"]]
        if system and not any(message.get("role") in _SYSTEM for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return cls(messages, _tools(row.get("tools")))

    def render(self, tokenizer: Tokenizer, count: int, *, reply: bool = False) -> str:
        """The first messages. Raises ValueError where the template objects to them, UserError where there is none."""
        given = {"tools": self.tools} if self.tools else {}  # a tokenizer of somebody else's may know none
        try:
            return tokenizer.render(self.messages[:count], reply=reply, **given)
        except UserError as error:
            if error.__cause__ is None:
                raise
            # The template itself objected, which is about this row alone: it is counted with the other bad rows.
            raise ValueError(f"{error.faults[0].what}: {error.faults[0].cure}") from error

    def question(self, tokenizer: Tokenizer) -> str:
        """All before the assistant's last words, and the opening of its turn."""
        count = len(self.messages)
        while count and self.messages[count - 1].get("role") == "assistant":
            count -= 1
        return self.render(tokenizer, count, reply=True)

    def pieces(self, tokenizer: Tokenizer, *, last_only: bool) -> list[Piece]:
        """The conversation up to the assistant's last turn, of which that or every turn of the assistant is learned.

        Raises ValueError where nobody answers, where the template does not write what was said, and where it writes
        the beginning of a conversation otherwise once more of it is there.
        """
        chosen = self._learned(last_only)
        asked = [self.render(tokenizer, number, reply=True) for number in chosen]
        answered = [self.render(tokenizer, number + 1) for number in chosen]
        cure = "" if last_only else LAST
        pieces, spans, written = list[Piece](), dict[int, tuple[int, int]](), ""
        for i, number in enumerate(chosen):
            content, through = self.messages[number].get("content"), answered[i]
            if i + 1 < len(chosen):
                through = _continued(through, asked[i + 1], tokenizer, content)
            given, said = _growth(written, asked[i], number, cure), _growth(asked[i], through, number, cure)
            if not said.strip():
                raise ValueError(f"the chat template writes nothing for message {number + 1}, an answer to be learned")
            ends = _turn_end(said, content)
            pieces += [Piece(given, False), Piece(said[:ends], True), Piece(said[ends:], False)]
            spans[number], written = (len(asked[i]), len(through)), through
        for number in chosen[:-1]:
            _check_end(written[slice(*spans[number])], number, self.messages[number].get("content"))
        self._check(written, spans)
        if self._is_doubtful(written, chosen[-1]):
            self._check_marks(tokenizer, written, spans)
        self._check_tools(tokenizer, asked[0], chosen[0])
        return [piece for piece in pieces if piece.text]

    def _learned(self, last_only: bool) -> list[int]:
        """Which messages are learned: the assistant's, but those of weight 0, as files for OpenAI's service have it."""
        answers = [number for number, message in enumerate(self.messages) if message.get("role") == "assistant"]
        if not answers:
            raise ValueError("no message has the role 'assistant', so that there is no answer to learn")
        for number in answers:
            if (weight := self.messages[number].get("weight")) not in (None, 0, 1):
                raise ValueError(f"message {number + 1} has the weight {weight!r}: make it 0, or 1, to be learned")
        asked = answers[-1:] if last_only else answers
        chosen = [number for number in asked if self.messages[number].get("weight") != 0]
        if not chosen:
            which = "the last answer has" if last_only else "all answers have"
            raise ValueError(f"{which} weight 0, so that there is no answer to learn: leave such rows out")
        return chosen

    def _check(self, text: str, spans: Mapping[int, tuple[int, int]]) -> None:
        """Raises ValueError where the text does not hold all that was said, in its order, answers in their spans.

        What is not learned is before the answer that follows it. System prompts may be anywhere, since some families
        keep them for the last question. An answer that is not learned may lose its thoughts, as it does where the
        model is asked.
        """
        at = 0
        for number, message in enumerate(self.messages[: 1 + max(spans)]):
            start, end = spans[number] if number in spans else (at, min(spans[one][0] for one in spans if one > number))
            known = at = max(at, start)
            for part in _parts(message, learned=number in spans):
                anywhere = message.get("role") in _SYSTEM
                found, length = _find(text, part, 0, len(text)) if anywhere else _find(text, part, at, end)
                if found < 0:
                    raise ValueError(_lost(text, part, number, message))
                at = at if anywhere else found + length
            for scalar in _calls(message):
                if not _is_in(text[known:end], scalar):
                    raise ValueError(_lost(text, str(scalar), number, message))

    def _is_doubtful(self, text: str, last: int) -> bool:
        """Whether some of what was said is also found where it was not said: by chance, or since it is there twice."""
        said = (part for message in self.messages[: last + 1] for part in _parts(message, learned=True))
        return any(len(part) < CERTAIN or text.count(part) != 1 for part in said)

    def _check_marks(self, tokenizer: Tokenizer, text: str, spans: Mapping[int, Any]) -> None:
        """As `_check`, with words in place of what was said that are nowhere else. Of thoughts nothing is asked."""
        stem, last, at = "qx", max(spans), 0
        while stem in text:
            stem += "x"
        marked = [_marked(message, f"{stem}{number}y") for number, message in enumerate(self.messages[: last + 1])]
        try:
            written = Conversation(marked, self.tools).render(tokenizer, last + 1)
        except ValueError:  # it wants other words, and there is nothing to compare
            return
        for number, message in enumerate(self.messages[: last + 1]):
            for mark, said in _marks(message, f"{stem}{number}y"):
                anywhere = message.get("role") in _SYSTEM
                found = written.find(mark, 0 if anywhere else at)
                if found < 0:
                    raise ValueError(_lost(written.replace(mark, said), said, number, message))
                if number in spans and written.count(mark) > 1:
                    raise ValueError(f"the chat template writes what message {number + 1} says more than once: {CURE}")
                at = at if anywhere else found

    def _check_tools(self, tokenizer: Tokenizer, asked: str, count: int) -> None:
        if self.tools and Conversation(self.messages, ()).render(tokenizer, count, reply=True) == asked:
            raise ValueError(f"the chat template leaves the row's tools out: {CURE}")


def _tools(value: Any) -> list[Mapping[str, Any]]:
    """Schemas, or the text of such, since columns of Parquet seldom hold objects of several forms."""
    value = _parsed(value, "tools") if isinstance(value, str) else value
    if value is None or (isinstance(value, Sequence) and all(isinstance(tool, Mapping) for tool in value)):
        return list(value or ())
    raise ValueError("has tools that are no list of JSON schemas")


def _called(message: Message) -> Message:
    """A message whose calls have their arguments as objects. Services give them as text, and templates expect neither
    the quotes nor the escapes."""
    if not (calls := message.get("tool_calls")):
        return message
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError("has tool_calls that are no list of calls")
    return {**message, "tool_calls": [_call(call) for call in calls]}


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    given = call.get("arguments")
    return {**call, "arguments": _parsed(given, "a tool call's arguments")} if isinstance(given, str) else call


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has {what} that are no JSON: {error}") from error


def _parts(message: Message, *, learned: bool) -> Iterator[str]:
    """What was said in a message, each part without the blanks around it, which templates may take away."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [one["text"] for one in content or () if "text" in one]
    if learned:
        texts = [next((message[name] for name in _REASONING if message.get(name)), None), *texts]
    for text in texts:
        said = _THOUGHTS.split(text) if isinstance(text, str) else []
        if message.get("role") == "assistant" and not learned:
            said = said[-1:]
        yield from (part for one in said if (part := one.strip()))


def _marks(message: Message, stem: str) -> Iterator[tuple[str, str]]:
    """The marks that a rendering must have in place of what a message says, each with that; without the thoughts."""
    content = message.get("content")
    parts = _THOUGHTS.split(content) if isinstance(content, str) else []
    for number, part in enumerate(parts):
        if part.strip() and (number == len(parts) - 1 or message.get("role") != "assistant"):
            yield f"{stem}{number}z", part.strip()


def _marked(message: Message, stem: str) -> Message:
    """A message with marks in place of what it says, and the blanks around that."""
    if not isinstance(content := message.get("content"), str):
        return message
    between, parts = _THOUGHTS.findall(content), _THOUGHTS.split(content)
    for number, part in enumerate(parts):
        if said := part.strip():
            parts[number] = part.replace(said, f"{stem}{number}z")
    return {**message, "content": "".join(one + after for one, after in zip(parts, [*between, ""], strict=True))}


def _calls(message: Message) -> Iterator[str | int | float]:
    """What the calls in a message are made of: names, keys, texts, numbers and truths."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        yield from _leaves([function.get("name"), function.get("arguments")])


def _leaves(value: Any) -> Iterator[str | int | float]:
    """Without what is null: columns of Parquet have a null for each key of any other row."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if one is not None:
                yield from _leaves([key, one])
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)


def _find(text: str, part: str, start: int, end: int) -> tuple[int, int]:
    """Where a part begins, -1 for nowhere, and how long it is: as it is, or as JSON writes it."""
    for form in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]):
        if (found := text.find(form, start, end)) >= 0:
            return found, len(form)
    return -1, 0


def _is_in(text: str, scalar: str | int | float) -> bool:
    """Whether a text has a scalar: numbers and truths as words of their own, as JSON or Python writes them."""
    if isinstance(scalar, str):
        return _find(text, scalar, 0, len(text))[0] >= 0
    forms = "|".join(map(re.escape, (json.dumps(scalar), str(scalar))))
    return re.search(rf"(?<![\w.-])(?:{forms})(?!\w|\.\d)", text) is not None


def _lost(text: str, part: str, number: int, message: Message) -> str:
    does = "moves" if part in text else "leaves out, or changes,"
    return f"the chat template {does} what message {number + 1} ({message.get('role')}) says, {part[:40]!r}: {CURE}"


def _continued(answered: str, longer: str, tokenizer: Tokenizer, content: Any) -> str:
    """A rendering as it stands once the conversation goes on.

    Some put an end that they then take back: Phi-3's after that of the turn, gpt-oss' in its place. Where nothing ends
    the turn but what they now put instead, that is its end.
    """
    if longer.startswith(answered):
        return answered
    bare = answered.removesuffix(tokenizer.decode([tokenizer.eos_id], special=True))
    rest = longer.removeprefix(bare)
    if rest == longer or _turn_end(bare, content) < len(bare) or not _ends_with(bare, content):
        return bare
    first = tokenizer.encode(rest)[:1]
    mark = "" if tokenizer.decode(first) else tokenizer.decode(first, special=True)
    return bare + mark if rest.startswith(mark) else bare


def _growth(shorter: str, longer: str, number: int, cure: str) -> str:
    """What a longer rendering adds. Raises ValueError where it does not begin with the shorter one."""
    if longer.startswith(shorter):
        return longer[len(shorter) :]
    same = next((at for at, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    raise ValueError(
        f"the chat template rewrites what came before message {number + 1} once it is there: "
        f"{shorter[same : same + 40]!r} becomes {longer[same : same + 40]!r}, so that the answers cannot be told "
        f"apart{cure or f': {CURE}'}"
    )


def _turn_end(said: str, content: Any) -> int:
    """Length of a turn without the blanks after its end marker, which nobody generates. Without a marker, all of it."""
    return len(said) if _ends_with(said, content) else len(said.rstrip())


def _check_end(said: str, number: int, content: Any) -> None:
    """Raises ValueError for a turn that stops with what was said in it."""
    if isinstance(content, str) and content.strip() and said.endswith((content, content.strip())):
        raise ValueError(
            f"the chat template ends message {number + 1} (assistant) with nothing, so that its end would not be "
            f"learned: set model.chat_template to one that ends each turn{LAST}"
        )


def _ends_with(said: str, content: Any) -> bool:
    spoken = content.strip() if isinstance(content, str) else ""
    return bool(spoken) and said.rstrip().endswith(spoken)
