"""`loomtune plan`: what a run will take, whether it fits, and what would be better."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.errors import UserError
from loomtune_plugins.commands.words import parser, read

if TYPE_CHECKING:
    from loomtune.plan import Finding
    from loomtune_plugins.commands.plan.foreseen import Oracle

DOES_NOT_FIT = 1
"""Exit code where the plan, or everything that was searched, does not fit."""


def plan(words: Sequence[str]) -> int:
    """Prints what is foreseen. 0: it fits, or no hardware is named; 1: it does not fit; 2: it cannot be at all."""
    options = read(_parser(), _told(words))
    from loomtune import api
    from loomtune.catalogue import installed
    from loomtune_plugins.commands.plan import worlds

    _sound(options)
    composed = api.compose(options.overrides, options.config_dir, options.world or 0)
    world = worlds.world(composed, installed(), options.world)
    composed = worlds.placed(composed, world)
    warnings = api.check(composed, simulated=True)
    from loomtune_plugins.commands.plan.foreseen import Oracle

    oracle = Oracle(composed, world, options.rank)
    if options.search is not None:
        from loomtune_plugins.commands.plan.searching import searched

        return searched(oracle, options)
    return _told_of(oracle, warnings, options)


def _told_of(oracle: Oracle, warnings: Sequence[Finding], options: argparse.Namespace) -> int:
    from loomtune_plugins.commands.plan.described import described

    said = described(oracle.foresee(warnings))
    if options.json:
        print(json.dumps(said, indent=1))
    else:
        from loomtune_plugins.commands.plan.shown import show

        show(said)
    if options.picture:
        from loomtune_plugins.commands.plan.picture import moments

        options.picture.write_text(moments(said))
    return DOES_NOT_FIT if said["fits"] is False else 0


def _sound(options: argparse.Namespace) -> None:
    """Raises UserError for what would be found wrong after minutes."""
    from loomtune_plugins.commands.plan import space

    if options.world is not None and options.world < 1:
        raise UserError.of(f"--world {options.world} has no process", "name at least 1")
    if options.search is not None:
        space.asked(options.search)
    if options.seconds < 0:
        raise UserError.of(f"--seconds {options.seconds:g} is less than none", "name at least 0")
    if options.picture and not options.picture.parent.is_dir():
        raise UserError.of(f"--picture: there is no folder {options.picture.parent}", "make it, or name another file")


def _parser() -> argparse.ArgumentParser:
    asked = parser("plan")
    asked.add_argument("--json", action="store_true", help="all of it, as docs/planning.md describes")
    asked.add_argument("--world", type=int, metavar="N", help="as on N processes; default: as the launcher says")
    asked.add_argument("--rank", type=int, default=0, metavar="R", help="which rank's memory is foretold")
    axes = "which configurations fit, best first; of these axes alone: sharding,micro,... (all: whatever there is)"
    asked.add_argument("--search", metavar="AXES", help=axes)
    asked.add_argument("--by", default="time", choices=("time", "cost", "gpus"), help="what --search ranks by")
    asked.add_argument("--seconds", type=float, default=300.0, help="after which --search tries no more layouts")
    asked.add_argument("--picture", type=Path, metavar="FILE.svg", help="memory, or with --search memory and speed")
    asked.add_argument("--config-dir", action="append", default=[], help="a folder of your own Hydra configs")
    return asked


def _told(words: Sequence[str]) -> list[str]:
    """`--search` alone means everything, though settings follow it."""
    told = list(words)
    for place, word in enumerate(told):
        follows = told[place + 1] if place + 1 < len(told) else "-"
        if word == "--search" and (follows.startswith("-") or "=" in follows):
            told[place] = "--search=all"
    return told
