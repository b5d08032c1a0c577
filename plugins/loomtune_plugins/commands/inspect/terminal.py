"""Rows and figures on a terminal; where there is none, or no colour is wanted, what is learned stands in «marks»."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from rich.console import Console
from rich.text import Text

from loomtune.plan import Finding
from loomtune_plugins.commands.inspect.rows import REJECTED, ShownLine, ShownPart, ShownRow, Stretch
from loomtune_plugins.commands.inspect.spelling import visible
from loomtune_plugins.commands.inspect.summary import Summary

STYLES = {"given": "", "learned": "green", "sign": "cyan", "end": "black on green", "gap": "dim italic"}
UNWANTED = STYLES | {"learned": "red", "end": "white on red"}
LEARNED = ("learned", "end")
SOFT, STRONG, ALARM = "dim", "bold", "yellow"
BAR = 36
"""Columns of the longest bar."""

EIGHTHS = " ▏▎▍▌▋▊▉"


class _Screen(Console):
    """Leaves it to the command line to end where the reader has gone, as `head` does: rich would call it a failure."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Terminal:
    """Writes to a stream, in colours where it is a terminal that has them (and NO_COLOR is not set)."""

    def __init__(self, stream: IO[str] | None = None, *, apart: bool = False) -> None:
        self._screen = _Screen(file=stream or sys.stdout, highlight=False, markup=False, emoji=False)
        self._plain = self._screen.color_system is None or bool(os.environ.get("NO_COLOR"))
        self._apart = apart

    def show(self, lines: Sequence[ShownLine], summary: Summary, doubts: Sequence[Finding], learned: str) -> None:
        """All of it. learned: what targets are."""
        if lines:
            self._put(self._legend(learned))
        for number, line in enumerate(lines, start=1):
            if len(line.rows) > 1:
                filled = f"{line.tokens:,} of {line.width:,} tokens"
                self._rule(f"packed row {number}", f"{len(line.rows)} rows · {filled}", "━")
            for row in line.rows:
                self._row(row)
        self._summary(summary)
        for doubt in doubts:
            what, cure = (visible(text, lines=False) for text in (doubt.what, doubt.cure))
            self._put(Text.assemble((f"! {what}", ALARM), "\n", (f"  cure: {cure}", SOFT)))

    def _put(self, text: Text | str = "") -> None:
        self._screen.print(text, soft_wrap=True)

    def _legend(self, learned: str) -> Text:
        if self._plain:
            return Text(f"given, «{learned}»; ⏎ new line, · blank at an edge")
        words = (("given", "given"), (learned, "learned"), ("special token", "sign"), ("target that ends", "end"))
        shown = Text("  ").join(Text(word, STYLES[kind]) for word, kind in words)
        return Text.assemble(shown, ("   ⏎ new line  · blank at an edge", SOFT))

    def _rule(self, title: str, said: str, line: str = "─") -> None:
        title, said = visible(title, lines=False), visible(said, lines=False)
        rest = max(3, min(self._screen.width, 100) - len(title) - len(said) - 8)
        self._put(Text.assemble("\n", (line * 2, SOFT), " ", (title, STRONG), (f" {line} {said} {line * rest}", SOFT)))

    def _row(self, row: ShownRow) -> None:
        numbers = "".join(f" · {name}={value:g}" for name, value in row.numbers.items())
        self._rule(row.origin, f"{row.tokens:,} tokens · {row.learned:,} targets{numbers}")
        for part in row.parts:
            self._part(part)

    def _part(self, part: ShownPart) -> None:
        if part.name:
            told = f" {part.tokens:,} tokens · {part.learned:,} targets"
            self._put(Text.assemble(("▸ ", SOFT), (visible(part.name, lines=False), STRONG), (told, SOFT)))
        text = Text.assemble(*self._text(part.stretches, UNWANTED if part.name == REJECTED else STYLES))
        if text.plain.endswith("\n"):
            text.right_crop(1)  # printing ends the line
        self._put(text)

    def _text(self, stretches: Sequence[Stretch], styles: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        marked = False
        for number, stretch in enumerate(stretches):
            if self._apart and number:
                yield "│", SOFT
            if self._plain and marked != (stretch.kind in LEARNED):
                yield "»" if marked else "«", ""
                marked = not marked
            yield stretch.text, styles[stretch.kind]
        if marked:
            yield "»", ""

    def _summary(self, summary: Summary) -> None:
        self._rule(summary.title, summary.subtitle, "━")
        width = max((len(name) for name, _ in summary.facts), default=0)
        for name, said in summary.facts:
            self._put(Text.assemble((f"{name:<{width}}", SOFT), f"  {visible(said, lines=False)}"))
        most = max((count for *_, count in summary.histogram), default=0)
        for begin, end, count in summary.histogram:
            bar = _bar(count / most) if most else ""
            span = f"{begin:,}–{end:,}"
            self._put(Text.assemble((f"{span:>{width + 2}}  ", SOFT), (bar, "green"), (f" {count:,}", SOFT)))


def _bar(share: float) -> str:
    """A bar to an eighth of a column; what is not nothing shows something."""
    eighths = max(1, round(share * BAR * 8)) if share else 0
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
