"""Rows to token ids, with what is to be predicted.

Everything here holds to one rule: *what is trained begins with exactly the tokens that a prompt has when the model is
asked*. So text is tokenised whole only where its tokens do not straddle the end of a prompt, and piece by piece
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loomtune.contracts import Row, Segment, Tokenizer
from loomtune.errors import Fault, UserError, near
from loomtune_plugins.objectives.conversations import Conversation, Piece

BOS = ("auto", "always", "never")
"""When a text begins with the beginning token; see `begin`."""

ANCHORS = ("\n", ".", ":")
"""Texts whose ends tokens seldom straddle."""


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
    ` A`), and where a tokenizer puts a blank before each text (SentencePiece). The second goes away by tokenising a
    piece behind the one before it, or behind an anchor, and taking that off; the first is how the model would be
    asked, and stays.
    """
    encoded = Encoded()
    whole = tokenizer.encode("".join(piece.text for piece in pieces))
    text, before, apart, same = "", "", list[int](), True
    for number, piece in enumerate(pieces, 1):
        text += piece.text
        known, last = len(encoded.ids), number == len(pieces)
        if last and same:
            encoded.add(whole[known:], piece.learned)
            break
        part = tokenizer.encode(piece.text)
        ids = part
        if known and not (same and _are_at(whole, known, ids)):
            behind = _rest(tokenizer.encode(before + piece.text), apart)
            if behind is None or not (same and _are_at(whole, known, behind)):
                further = None if last else _rest(tokenizer.encode(text), encoded.ids)
                behind = further if behind is None or further is not None else behind
            ids = _anchored(piece.text, part, tokenizer) if behind is None else behind
        same = same and _are_at(whole, known, ids)
        encoded.add(ids, piece.learned)
        before, apart = piece.text, part
    return encoded


def _are_at(whole: list[int], start: int, ids: list[int]) -> bool:
    return whole[start : start + len(ids)] == ids


def _rest(longer: list[int], known: list[int]) -> list[int] | None:
    """What tokens add to those known, where they begin with them."""
    return longer[len(known) :] if longer[: len(known)] == known else None


def _anchored(text: str, part: list[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text in the middle of another: without the blank that a tokenizer puts before each text."""
    for anchor in ANCHORS:
        before = tokenizer.encode(anchor)
        if _rest(tokenizer.encode(anchor + "a"), before) == tokenizer.encode("a"):  # it puts none
            return part
        if (found := _rest(tokenizer.encode(anchor + text), before)) is not None:
            return found
    return part


def close(encoded: Encoded, eos: int) -> None:
    """Ends a conversation with a learned `eos`, unless the template's own turn end is it.

    Blanks between the turn's end and an added `eos` are learned too: the model has to write them to get there.
    """
    tail = max((at + 1 for at, learned in enumerate(encoded.learned) if learned), default=0)
    if encoded.ids[tail - 1 : tail] == [eos]:
        return
    encoded.learned[tail:] = [True] * (len(encoded.ids) - tail)
    encoded.add([eos], learned=True)


def answered(
    row: Row, tokenizer: Tokenizer, *, separator: str = "", last_only: bool = False, system: str = ""
) -> Encoded:
    """A row's prompt and completion, its conversation, or its plain text, ended by a learned token.

    system: the system prompt of conversations that have none.
    Raises ValueError where the row has none of these, and where it is no conversation and there is a system prompt.
    """
    if "messages" in row:
        encoded = join(Conversation.of(row, system).pieces(tokenizer, last_only=last_only), tokenizer)
        close(encoded, tokenizer.eos_id)
        return encoded
    _check_plain(row, system)
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


def prompt(row: Row, tokenizer: Tokenizer, *, separator: str = "", bos: str = "auto", system: str = "") -> list[int]:
    """How the model is asked: the tokens before the first that it is to write.

    Raises ValueError where the row has no prompt, and where it is no conversation and there is a system prompt.
    """
    if "messages" in row:
        text = Conversation.of(row, system).question(tokenizer)
    else:
        _check_plain(row, system)
        text = text_of(row, "prompt") + separator
    encoded = join([Piece(text, False)], tokenizer)
    begin(encoded, row, tokenizer, bos)
    return encoded.ids


def _check_plain(row: Row, system: str) -> None:
    if system:
        raise ValueError(
            f"is no conversation, before which objective.system could be put; it has {columns(row)}: "
            "leave objective.system empty, and write it into the prompts"
        )


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
