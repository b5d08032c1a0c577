"""Rows to token ids, with what is to be predicted.

Everything here holds to one rule: *what is trained begins with exactly the tokens that a prompt has when the model is
asked*. So text is tokenised whole only where its tokens do not straddle the end of a prompt, and piece by piece
otherwise. What of a conversation the assistant said is found by comparing renderings of the chat template, with and
without a turn, never by looking for markers: any template will do that writes a conversation from front to back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loomtune.contracts import Row, Segment, Tokenizer
from loomtune.errors import Fault, UserError, near

Messages = Sequence[Mapping[str, Any]]

BOS = ("auto", "always", "never")
"""When a text begins with the beginning token; see `begin`."""


def unknown(settings: Any, **known: Sequence[str]) -> list[Fault]:
    """A fault of each setting that has none of its known values."""
    return [
        Fault(
            f"objective.{key}={value} is not known.{near(value, values)}",
            f"set objective.{key} to {' or '.join(values)}",
        )
        for key, values in known.items()
        if (value := getattr(settings, key)) not in values
    ]


def refuse(faults: Sequence[Fault]) -> None:
    """Raises UserError where there are any."""
    if faults:
        raise UserError(*faults)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text. learned: whether its tokens are to be predicted."""

    text: str
    learned: bool


@dataclass(slots=True)
class Encoded:
    """Token ids, and for each whether it is to be predicted."""

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)

    def add(self, ids: Iterable[int], learned: bool) -> None:
        """Appends tokens that are all learned, or all not."""
        before = len(self.ids)
        self.ids.extend(ids)
        self.learned.extend([learned] * (len(self.ids) - before))

    def begin(self, token: int | None) -> None:
        """Puts a token first, unless there is none or the text brought it along."""
        if token is not None and self.ids[:1] != [token]:
            self.ids.insert(0, token)
            self.learned.insert(0, False)

    def end(self, token: int) -> None:
        """Ends with a token to be predicted, unless the text already did."""
        if self.ids[-1:] != [token]:
            self.add([token], learned=True)

    def segment(self, max_length: int) -> Segment:
        """The tokens, cut at the end. Nothing comes before the first, so that it cannot be predicted."""
        learned = np.array(self.learned[:max_length], dtype=np.bool_)
        learned[:1] = False
        return Segment(np.array(self.ids[:max_length], dtype=np.int32), learned)


def join(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Encoded:
    """Tokenises consecutive pieces: as one text where its tokens keep to the pieces' borders, else each border by rule.

    Pieces apart differ from the whole text where a token straddles a border (`Answer: ` + `A` against `Answer:` +
    ` A`), and where a tokenizer puts a blank before each text (SentencePiece). The second goes away by tokenising the
    text up to a piece's end and taking off what came before; the first is how the model would be asked, and stays.
    """
    encoded = Encoded()
    whole = tokenizer.encode("".join(piece.text for piece in pieces))
    text = ""
    for piece in pieces[:-1]:
        text += piece.text
        known, part = len(encoded.ids), tokenizer.encode(piece.text)
        fits = whole[:known] == encoded.ids and whole[known : known + len(part)] == part
        encoded.add(part if fits or not known else _rest(tokenizer.encode(text), encoded.ids, part), piece.learned)
    if pieces:
        ends_whole = whole[: len(encoded.ids)] == encoded.ids
        part = whole[len(encoded.ids) :] if ends_whole else tokenizer.encode(pieces[-1].text)
        encoded.add(part, pieces[-1].learned)
    return encoded


def _rest(longer: list[int], known: list[int], otherwise: list[int]) -> list[int]:
    """What tokens add to those known, where they begin with them."""
    return longer[len(known) :] if longer[: len(known)] == known else otherwise


def conversation(messages: Messages, tokenizer: Tokenizer, *, last_only: bool) -> Encoded:
    """A conversation up to the assistant's last turn, of which that or every turn of the assistant is learned.

    Raises ValueError where nobody answers, where the template leaves an answer out, and where it writes the beginning
    of a conversation otherwise once more of it is there.
    """
    answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise ValueError("no message has the role 'assistant', so that there is no answer to learn")
    chosen = answers[-1:] if last_only else answers
    asked = [_render(tokenizer, messages[:index], reply=True) for index in chosen]
    answered = [_render(tokenizer, messages[: index + 1]) for index in chosen]
    pieces: list[Piece] = []
    written = ""
    for i, index in enumerate(chosen):
        through = answered[i] if i + 1 == len(chosen) else _continued(answered[i], asked[i + 1], tokenizer)
        said = _growth(asked[i], through, index)
        if not said.strip():
            raise ValueError(f"the chat template writes nothing for message {index + 1}, an answer to be learned")
        ends = _turn_end(said, messages[index].get("content"))
        given = Piece(_growth(written, asked[i], index), False)
        pieces += [given, Piece(said[:ends], True), Piece(said[ends:], False)]
        written = through
    return join([piece for piece in pieces if piece.text], tokenizer)


def close(encoded: Encoded, eos: int) -> None:
    """Ends a conversation with a learned `eos`, unless the template's own turn end is it.

    Blanks between the turn's end and an added `eos` are learned too: the model has to write them to get there.
    """
    tail = max((at + 1 for at, learned in enumerate(encoded.learned) if learned), default=0)
    if encoded.ids[tail - 1 : tail] == [eos]:
        return
    encoded.learned[tail:] = [True] * (len(encoded.ids) - tail)
    encoded.add([eos], learned=True)


def answered(row: Row, tokenizer: Tokenizer, *, separator: str = "", last_only: bool = False) -> Encoded:
    """A row's prompt and completion, its conversation, or its plain text, ended by a learned token.

    Raises ValueError where the row has none of these.
    """
    if "messages" in row:
        encoded = conversation(row["messages"], tokenizer, last_only=last_only)
        close(encoded, tokenizer.eos_id)
        return encoded
    if "completion" in row:
        asked = Piece(text_of(row, "prompt") + separator, False)
        encoded = join([asked, Piece(text_of(row, "completion"), True)], tokenizer)
    elif "text" in row:
        encoded = join([Piece(text_of(row, "text"), True)], tokenizer)
    else:
        cure = "set data.format=completion or messages, or for pairs data.completion=chosen"
        raise lacking(row, "neither a completion nor messages nor text, one of which objective=sft learns from", cure)
    encoded.end(tokenizer.eos_id)
    return encoded


def begin(encoded: Encoded, row: Row, tokenizer: Tokenizer, bos: str) -> None:
    """Puts the beginning token first, where it is not there.

    bos: `auto` does as servers do: what the tokenizer adds to a plain text by itself, and to a conversation nothing,
        since the chat template says how that begins. `always` and `never` mean every row.
    """
    if bos == "always" or (bos == "auto" and tokenizer.adds_bos and "messages" not in row):
        encoded.begin(tokenizer.bos_id)


def prompt(row: Row, tokenizer: Tokenizer, *, separator: str = "", bos: str = "auto") -> list[int]:
    """How the model is asked: the tokens before the first that it is to write.

    Raises ValueError where the row has no prompt.
    """
    if "messages" in row:
        messages = list(row["messages"])
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        text = _render(tokenizer, messages, reply=True)
    else:
        text = text_of(row, "prompt") + separator
    encoded = join([Piece(text, False)], tokenizer)
    begin(encoded, row, tokenizer, bos)
    return encoded.ids


def lacking(row: Row, what: str, cure: str) -> ValueError:
    """That a row is of another form than its objective reads, with what it has."""
    if "answers" in row:
        cure = "set data.answers=answers, the best first, or " + cure.removeprefix("set ")
    return ValueError(f"has {what}; it has {columns(row)}: {cure}")


def columns(row: Row) -> str:
    """What a row has, for messages."""
    return ", ".join(key for key in row if key != "origin") or "nothing"


def text_of(row: Row, key: str) -> str:
    """A row's text under a key. Raises ValueError where it is none."""
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"has no text as its {key}")
    return value


def _render(tokenizer: Tokenizer, messages: Messages, *, reply: bool = False) -> str:
    """What the template writes. Raises ValueError where it refuses these messages, UserError where there is none."""
    try:
        return tokenizer.render(messages, reply=reply)
    except UserError as error:
        if error.__cause__ is None:
            raise
        # The template itself objected, which is about this row alone: it is counted with the other bad rows.
        raise ValueError(error.faults[0].what) from error


def _continued(answered: str, longer: str, tokenizer: Tokenizer) -> str:
    """A rendering as it stands once the conversation goes on: some (Phi-3's) put an end that they then take back."""
    if longer.startswith(answered):
        return answered
    return answered.removesuffix(tokenizer.decode([tokenizer.eos_id], special=True))


def _growth(shorter: str, longer: str, index: int) -> str:
    """What a longer rendering adds. Raises ValueError where it does not begin with the shorter one."""
    if longer.startswith(shorter):
        return longer[len(shorter) :]
    same = next((at for at, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    raise ValueError(
        f"the chat template rewrites what came before message {index + 1} once it is there: "
        f"{shorter[same : same + 40]!r} becomes {longer[same : same + 40]!r}, so that the answers cannot be told "
        "apart; with objective.turns=last only the last one has to be"
    )


def _turn_end(said: str, content: Any) -> int:
    """Length of a turn without the blanks after its end marker, which nobody generates. Without a marker, all of it."""
    bare = said.rstrip()
    spoken = content.strip() if isinstance(content, str) else ""
    return len(said) if spoken and bare.endswith(spoken) else len(bare)
