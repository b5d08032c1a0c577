"""A comparison, printed and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loomtune_plugins.commands.compare import shown
from loomtune_plugins.commands.compare.rows import Group, Row, best, differing, groups, rows
from loomtune_plugins.commands.sweeps.goal import Goal


def compared(folders: Sequence[Path], out: Path | None, goal: Goal) -> None:
    """Prints the comparison, and writes it into a folder."""
    found = rows(folders, goal)
    keys = differing(found)
    made = groups(found, keys)
    winner = best(found, keys, goal)
    lines = _lines(found, keys, made, winner, goal)
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
        "over_seeds": [_grouped(group) for group in made],
    }
    (out / "comparison.json").write_text(json.dumps(described, indent=1, default=str) + "\n")
    (out / "comparison.md").write_text("\n".join(lines) + "\n")
    (out / "comparison.html").write_text(shown.html(title, found, keys, made, goal), encoding="utf-8")
    if winner:
        text = yaml.safe_dump(_best(winner, goal), sort_keys=False, allow_unicode=True, width=1000)
        (out / "best.yaml").write_text(text)
    print(f"\nall of it, with curves: {out / 'comparison.html'}")


def _lines(
    found: Sequence[Row], keys: Sequence[str], made: Sequence[Group], winner: Row | None, goal: Goal
) -> list[str]:
    lines = shown.markdown(shown.table(found, keys, goal))
    if several := shown.over_seeds(made, goal):
        lines += ["", *shown.markdown(several)]
    if failed := shown.failures(found):
        lines += ["", "Failed:", *failed]
    if found and all(row.value is None for row in found):
        lines += ["", f"No run has {goal.metric}. {shown.measured(found)}"]
    if winner:
        value = f"{goal.metric} {shown.number(winner.value)}"
        lines += ["", f"Best: {winner.folder.name}, {value}", f"    {shown.command(winner)}"]
    return lines


def _grouped(group: Group) -> Mapping[str, Any]:
    spread = {"mean": group.mean, "spread": group.spread}
    return {"settings": dict(group.settings), "values": group.values, **spread}


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
