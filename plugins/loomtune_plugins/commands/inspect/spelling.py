"""Token ids as text that can be looked at: every token has its own, and nothing in it acts on a terminal or a page."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from loomtune.contracts import Tokenizer

HALF = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character."""

LONGEST = 4
"""Bytes of the longest character, and so the most tokens that one falls apart into."""

NAMED = {"\n": "⏎\n", "\t": "⇥\t", "\x7f": "␡", "\u00a0": "⍽"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode that act, or show nothing: control, format, halves of pairs, private, none, and separators."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the few that a character falls apart into.

    special: no text, but a sign such as `<s>`. ends: it is the one that ends an answer.
    """

    text: str
    tokens: tuple[int, ...]
    learned: bool
    special: bool
    ends: bool


class Speller:
    """Spells token ids in their context, which decides on blanks in some tokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_special = cache(self._special)

    def pieces(self, tokens: Sequence[int], learned: Sequence[bool], before: Sequence[int] = ()) -> Iterator[Piece]:
        """The text of each token, as it is decoded: unescaped, together that of all. before: what comes before them."""
        whole, shift = [*before, *tokens], len(before)
        known, done = 0, shift  # what was spelled last begins at `known`, and what comes next at `done`
        for at in range(shift, len(whole)):
            ends = at + 1
            text = self._added(whole[known:done], whole[done:ends])
            last = ends == len(whole) or learned[at - shift] != learned[ends - shift] or self.is_special(whole[ends])
            if (text and not text.endswith(HALF)) or last or ends - done == LONGEST:
                piece = tuple(whole[done:ends])
                sign = len(piece) == 1 and self.is_special(piece[0])
                yield Piece(text, piece, learned[at - shift], sign, sign and piece[0] == self._tokenizer.eos_id)
                known, done = done, ends

    def text(self, tokens: Sequence[int]) -> str:
        """All of it, with special tokens."""
        return self._tokenizer.decode(tokens, special=True)

    def one(self, token: int) -> str:
        """A token, quoted and safe, as it is written behind another: some take a blank off where a text begins."""
        return f"'{visible(self._added([self._tokenizer.eos_id], [token]), lines=False)}'"

    def joint(self, before: Sequence[int], after: Sequence[int]) -> tuple[str, str]:
        """The texts of two neighbours."""
        return self.text(before), self._added(before, after)

    def _added(self, before: Sequence[int], new: Sequence[int]) -> str:
        known, longer = self.text(before), self.text([*before, *new])
        return longer[len(known) :] if longer.startswith(known) else self.text(new)

    def _special(self, token: int) -> bool:
        return not self._tokenizer.decode([token]) and bool(self.text([token]))


def visible(text: str, *, lines: bool = True) -> str:
    """Text without anything that acts: control characters, what turns the direction, what shows nothing, have signs.

    lines: whether a new line also begins one.
    """
    shown = text if text.isascii() and text.isprintable() else "".join(map(_shown, text))
    return shown if lines else shown.replace("\n", "").replace("\t", "")


@cache
def _shown(character: str) -> str:
    if character in NAMED:
        return NAMED[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's own pictures of them
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in UNSEEN else character
