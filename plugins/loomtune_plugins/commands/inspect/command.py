"""`loomtune inspect`: what is asked, and the answer in the form that is wanted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING

from loomtune.errors import UserError, near
from loomtune_plugins.commands.words import parser, read

if TYPE_CHECKING:
    from loomtune.run import Run
    from loomtune_plugins.commands.inspect.rows import ShownLine
    from loomtune_plugins.commands.inspect.spelling import Speller

DATA = "a file, a quoted pattern, a folder of prepared rows or of a run; none: what a run of these settings would read"


PATIENCE = 3.0
"""Seconds after which a user wants to know."""


def inspect(words: Sequence[str]) -> int:
    """Prints rows and figures, or writes them as a page."""
    options = _options(words)
    from loomtune import api  # only now: it brings Hydra along, and what follows torch, for which no help waits
    from loomtune_plugins.commands.inspect.asked import changed, planned

    plan, folder = planned(options.given)
    api.warn(api.check(plan))
    from loomtune.session import looked_at
    from loomtune_plugins.commands.inspect.doubts import doubts
    from loomtune_plugins.commands.inspect.figures import figures
    from loomtune_plugins.commands.inspect.layout import layout
    from loomtune_plugins.commands.inspect.page import page
    from loomtune_plugins.commands.inspect.spelling import Speller
    from loomtune_plugins.commands.inspect.summary import plain, summary
    from loomtune_plugins.commands.inspect.terminal import Terminal

    with _patience():
        run, split = looked_at(plan), options.split
    if split not in run.splits:
        known = ", ".join(run.splits)
        raise UserError.of(f"the data have no split '{split}'.{near(split, run.splits)}", f"there are: {known}")
    if folder is not None:
        api.warn(changed(folder, run, split))
    speller = Speller(run.tokenizer)
    lines = [] if options.json and not options.html else _lines(run, options, speller)
    found, laid = figures(run, split), layout(run, split)
    warnings, learned = doubts(run, split, found, speller), _learned(run)
    said = summary(run, split, found, laid, speller)
    if options.html:
        _write(Path(options.html), page(lines, said, warnings, learned, apart=options.tokens))
    if options.json:
        print(json.dumps(plain(run, split, found, laid, warnings, speller), indent=1))
    elif options.html:
        print(options.html)
    else:
        Terminal(apart=options.tokens).show(lines, said, warnings, learned)
    return 0


@contextmanager
def _patience() -> Iterator[None]:
    """Says after a while what takes so long; the samples are kept, so that it does so once."""
    told = "loomtune: rows are read and tokenised; this is kept for the next time and for the run"
    waiting = Timer(PATIENCE, print, [told], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _options(words: Sequence[str]) -> argparse.Namespace:
    asked = parser("inspect", settings=False)
    asked.add_argument("given", nargs="*", metavar="[DATA] key=value", help=f"{DATA}; and settings as of a run")
    asked.add_argument("--split", default="train", help="which of the data's splits")
    asked.add_argument("--rows", type=int, default=3, metavar="N", help="how many rows of the first step's batches")
    which = asked.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, metavar="N", help="the N-th sample of the split, counted from 1")
    which.add_argument("--find", metavar="TEXT", help="the first samples that contain a text, or were read there")
    asked.add_argument("--tokens", action="store_true", help="show where each token ends; on a page, its id")
    asked.add_argument("--html", metavar="FILE", help="write a page instead")
    asked.add_argument("--json", action="store_true", help="print the figures, for programs")
    options = read(asked, words)
    if options.rows < 0:
        raise UserError.of(f"--rows {options.rows} is negative", "name how many, or 0 for the figures alone")
    return options


def _lines(run: Run, options: argparse.Namespace, speller: Speller) -> list[ShownLine]:
    from loomtune_plugins.commands.inspect.rows import containing, first, numbered

    if options.row is not None:
        return numbered(run, options.split, options.row, speller, apart=options.tokens)
    if options.find is not None:
        return containing(run, options.split, options.find, options.rows, speller, apart=options.tokens)
    whole = bool(options.html)
    return first(run, options.split, options.rows, speller, apart=options.tokens, whole=whole)


def _learned(run: Run) -> str:
    """What targets are, in a few words."""
    return "target" if run.objective.roles()["policy"].head == "lm" else "target: a score is read before it"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError.of(f"--html {path} cannot be written: {error.strerror}", "name a file in a folder") from error
