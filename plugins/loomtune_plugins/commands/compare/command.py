"""`loomtune compare RUN|SWEEP...`: a table, curves and the best settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loomtune.errors import UserError
from loomtune_plugins.commands.compare import shown
from loomtune_plugins.commands.compare.rows import Row, best, differing, goal_of, groups, rows
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
    goal = goal_of(options.folders)
    if options.metric and options.metric != goal.metric:
        goal = chosen(options.metric, options.mode, "", None)
    elif options.mode:
        goal = Goal(goal.metric, options.mode)
    sweep = len(options.folders) == 1 and (options.folders[0] / "sweep.json").is_file()
    compared(options.folders, options.out or (options.folders[0] if sweep else None), goal)
    return 0


def compared(folders: Sequence[Path], out: Path | None, goal: Goal) -> None:
    """Prints the comparison, and writes it into a folder."""
    found = rows(folders, goal)
    keys = differing(found)
    made = groups(found, keys)
    winner = best(found, keys, goal)
    lines = [*shown.markdown(shown.table(found, keys, goal))]
    if several := shown.over_seeds(made, goal):
        lines += ["", *shown.markdown(several)]
    if failed := shown.failures(found):
        lines += ["", "Failed:", *failed]
    if winner:
        value = f"{goal.metric} {shown.number(winner.value)}"
        lines += ["", f"Best: {winner.folder.name}, {value}", f"    {shown.command(winner)}"]
    print("\n".join(lines))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    title = " and ".join(folder.resolve().name for folder in folders[:3])
    described = {
        "metric": goal.metric,
        "mode": goal.mode,
        "best": winner.folder.name if winner else None,
        "runs": [_described(row, keys) for row in found],
        "over_seeds": [
            {"settings": dict(group.settings), "values": group.values, "mean": group.mean, "spread": group.spread}
            for group in made
        ],
    }
    (out / "comparison.json").write_text(json.dumps(described, indent=1, default=str) + "\n")
    (out / "comparison.md").write_text("\n".join(lines) + "\n")
    (out / "comparison.html").write_text(shown.html(title, found, keys, made, goal), encoding="utf-8")
    if winner:
        (out / "best.yaml").write_text(
            yaml.safe_dump(_best(winner, goal), sort_keys=False, allow_unicode=True, width=1000)
        )
    print(f"\nall of it, with curves: {out / 'comparison.html'}")


def _described(row: Row, keys: Sequence[str]) -> Mapping[str, Any]:
    return {
        "run": str(row.folder),
        "settings": {key: row.setting(key) for key in keys},
        "overrides": row.typed,
        "status": row.status,
        "value": row.value,
        "steps": row.step,
        "seconds": row.seconds,
        "error": row.error,
    }


def _best(row: Row, goal: Goal) -> Mapping[str, Any]:
    """overrides: to be typed again as they stand here; command: the same, quoted for a shell."""
    value = {"metric": goal.metric, "mode": goal.mode, "value": row.value, "run": str(row.folder)}
    return {**value, "overrides": list(row.typed), "command": shown.command(row)}
