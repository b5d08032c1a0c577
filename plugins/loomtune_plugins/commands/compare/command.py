"""`loomtune compare RUN|SWEEP...`: a table, curves and the best settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loomtune.errors import UserError
from loomtune_plugins.commands.sweeps.goal import MODES, Goal, chosen
from loomtune_plugins.commands.words import parser, read


def compare(words: Sequence[str]) -> int:
    """Prints the table; writes files where it is asked to, or where one sweep is compared."""
    asked = parser("compare", settings=False)
    asked.add_argument("folders", nargs="+", metavar="RUN|SWEEP", type=Path)
    asked.add_argument("--metric", default="", help="default: what the sweep was after")
    asked.add_argument("--mode", default="", choices=MODES, help="whether less or more of it is better")
    asked.add_argument("--out", type=Path, metavar="DIR", help="where comparison.* go; default: into a sweep alone")
    options = read(asked, words)
    for folder in options.folders:
        if not folder.is_dir():
            raise UserError.of(f"there is no folder {folder}", "name folders made by `loomtune train`")
    from loomtune_plugins.commands.compare.comparison import compared  # it brings Hydra along, for which no help waits
    from loomtune_plugins.commands.compare.rows import goal_of

    goal = goal_of(options.folders)
    if options.metric and options.metric != goal.metric:
        goal = _asked(options.metric, options.mode)
    elif options.mode:
        goal = Goal(goal.metric, options.mode)
    sweep = len(options.folders) == 1 and (options.folders[0] / "sweep.json").is_file()
    compared(options.folders, options.out or (options.folders[0] if sweep else None), goal)
    return 0


def _asked(metric: str, mode: str) -> Goal:
    try:
        return chosen(metric, mode, "", None)
    except UserError:
        what = f"--metric {metric} does not say whether more or less of it is better"
        raise UserError.of(what, "add --mode max, or --mode min") from None
