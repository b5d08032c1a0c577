"""How the words behind a command are read: its own options, and settings as key=value between them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from loomtune_plugins.commands import commands

OVERRIDES = "settings as key=value, such as objective=sft optimizer.lr=1e-4; `--dry-run` shows all of them"


def parser(name: str, *, run: bool = False, settings: bool = True) -> argparse.ArgumentParser:
    """A command's parser. run: whether the first word names a run's folder. settings: whether settings may follow."""
    summary = next(command.summary for command in commands() if command.name == name)
    made = argparse.ArgumentParser(f"loomtune {name}", description=summary)
    if run:
        made.add_argument("folder", metavar="RUN")
    if settings:
        made.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    return made


def read(made: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """What the words say. Settings may stand before, between and after options."""
    options, rest = made.parse_known_intermixed_args(words)
    if rest:
        made.error(f"unrecognised: {' '.join(rest)}; settings are written key=value")
    return options
