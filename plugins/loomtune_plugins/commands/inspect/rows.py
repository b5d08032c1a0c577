"""Which rows are shown, and as what: laid out by the collator, spelled, and named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from loomtune.errors import UserError
from loomtune.run import Run
from loomtune.session import collated, drawn
from loomtune_plugins.commands.inspect.reading import Document, Line, Part, lines
from loomtune_plugins.commands.inspect.spelling import Piece, Speller, visible

HEAD, TAIL = 280, 100
"""Tokens at the beginning and the end of a long part that are shown where it is not shown whole."""

REJECTED = "rejected"
"""What objectives call a part whose targets are to become less likely."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Text that is shown in one way, safe to show.

    kind: `given`, `learned`, `sign` (a special token that is given), `end` (one that is learned), or `gap`, which
    stands for tokens that are not shown. tokens: its ids.
    """

    kind: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShownPart:
    """name: what it is; empty where a row has one part."""

    name: str
    tokens: int
    learned: int
    stretches: list[Stretch]


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A sample. numbers: its own, such as a label."""

    origin: str
    tokens: int
    learned: int
    numbers: Mapping[str, float]
    parts: list[ShownPart]


@dataclass(frozen=True, slots=True)
class ShownLine:
    """What stands in one row of a batch. tokens, width: without and with padding."""

    rows: list[ShownRow]
    tokens: int
    width: int


def first(run: Run, split: str, count: int, speller: Speller, *, apart: bool, whole: bool) -> list[ShownLine]:
    """The first rows of the first step's batches. apart: each token by itself. whole: however long they are."""
    rows = next(drawn(run, split), []) if count else []
    return _shown(run, split, rows, count, speller, apart=apart, whole=whole)


def numbered(run: Run, split: str, number: int, speller: Speller, *, apart: bool) -> list[ShownLine]:
    """One sample of the split, counted from 1. Raises UserError where there are not so many."""
    samples = len(run.splits[split])
    if not 1 <= number <= samples:
        what = f"--row {number}: split {split} has {samples:,} samples, counted from 1"
        raise UserError.of(what, "name one of them, or --find a text")
    return _shown(run, split, [number - 1], 1, speller, apart=apart, whole=True)


def containing(run: Run, split: str, text: str, count: int, speller: Speller, *, apart: bool) -> list[ShownLine]:
    """The first samples whose text, or whose origin, contains a text. Raises UserError where none does."""
    found = list(islice(_with(run, split, text, speller), max(1, count)))
    if not found:
        what = f"--find: nothing of split {split} contains '{visible(text, lines=False)}'"
        raise UserError.of(what, "look for less of it, or in another --split; capitals count")
    return _shown(run, split, found, len(found), speller, apart=apart, whole=True)


def _with(run: Run, split: str, text: str, speller: Speller) -> Iterator[int]:
    samples = run.splits[split]
    for index in range(len(samples)):
        parts = (segment.tokens.tolist() for segment in samples[index].segments)
        if text in samples.origin(index) or any(text in speller.text(part) for part in parts):
            yield index


def _shown(
    run: Run, split: str, rows: Sequence[int], count: int, speller: Speller, *, apart: bool, whole: bool
) -> list[ShownLine]:
    names = run.objective.parts()

    def part(one: Part) -> ShownPart:
        pieces = list(speller.pieces(one.tokens, one.learned, one.before))
        cut = pieces if whole or len(pieces) <= HEAD + TAIL else [*pieces[:HEAD], None, *pieces[-TAIL:]]
        told = names[one.number] if one.number < len(names) else f"part {one.number + 1}" if one.number else ""
        return ShownPart(told, len(one.tokens), sum(one.learned), list(_stretches(cut, pieces, apart=apart)))

    def row(one: Document) -> ShownRow:
        origin = run.splits[split].origin(rows[one.number])
        return ShownRow(origin, one.tokens, one.learned, one.numbers, [part(each) for each in one.parts])

    def line(one: Line) -> ShownLine:
        return ShownLine([row(each) for each in one.documents], one.tokens, one.width)

    return [line(one) for one in lines(collated(run, split, rows))[:count]]


def _stretches(shown: Iterable[Piece | None], pieces: Sequence[Piece], *, apart: bool) -> Iterator[Stretch]:
    """Neighbours of one kind together, unless each is wanted apart; blanks at their edges are made visible."""
    numbered = enumerate(shown)
    for (kind, _), group in groupby(numbered, key=lambda one: (_kind(one[1]), apart and one[0])):
        here = [piece for _, piece in group if piece is not None]
        if here:
            text = "".join(visible(piece.text) for piece in here)
            yield Stretch(kind, _edged(text), tuple(token for piece in here for token in piece.tokens))
        else:
            left = pieces[HEAD:-TAIL]
            tokens, learned = (sum(len(p.tokens) for p in left if p.learned or not only) for only in (False, True))
            yield Stretch("gap", f" … {tokens:,} tokens, {learned:,} targets … ", ())


def _kind(piece: Piece | None) -> str:
    if piece is None:
        return "gap"
    return ("end" if piece.learned else "sign") if piece.special else "learned" if piece.learned else "given"


def _edged(text: str) -> str:
    """A blank where a stretch begins or ends is easily overlooked, and often is the mistake."""
    bare = text.strip(" ")
    if not bare:
        return "·" * len(text)
    before = len(text) - len(text.lstrip(" "))
    return "·" * before + bare + "·" * (len(text) - before - len(bare))
