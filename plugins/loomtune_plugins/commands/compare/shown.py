"""A comparison as lines of text, as a page, and as the command of the best."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from loomtune_plugins import charts, page
from loomtune_plugins.commands.compare.rows import Group, Row, said
from loomtune_plugins.commands.sweeps.goal import Goal

_FEW = 12
"""A chart for each of so many settings that differ; of more, none would be read."""

Cells = Sequence[Sequence[str]]


def table(found: Sequence[Row], keys: Sequence[str], goal: Goal) -> list[list[str]]:
    """Head and rows, the best first."""
    ranked = sorted(found, key=lambda row: (row.status == "failed", row.status == "pruned", goal.rank(row.value)))
    head = [*keys, "status", goal.metric, "steps", "seconds", "run"]
    return [head, *([*(said(row.setting(key)) for key in keys), *_went(row)] for row in ranked)]


def _went(row: Row) -> list[str]:
    return [row.status, number(row.value), str(row.step), f"{row.seconds:.1f}", row.folder.name]


def over_seeds(made: Sequence[Group], goal: Goal) -> list[list[str]]:
    """Head and rows of what was run with several seeds; nothing where nothing was."""
    if all(len(group.values) < 2 for group in made):
        return []
    keys = list(made[0].settings)
    ranked = sorted(made, key=lambda group: goal.rank(group.mean))
    rows = [[*(said(group.settings[key]) for key in keys), *_spread(group)] for group in ranked]
    return [[*keys, "seeds", f"mean {goal.metric}", "spread"], *rows]


def _spread(group: Group) -> list[str]:
    return [str(len(group.values)), number(group.mean), number(group.spread)]


def number(value: float | None) -> str:
    """Six digits; nothing where there is no value."""
    return "" if value is None else f"{value:.6g}"


def markdown(cells: Cells) -> list[str]:
    """An aligned table. What would break its lines is written as its escape."""
    clean = [["" if cell == "" else _one_line(cell) for cell in row] for row in cells]
    widths = [max(3, *(len(row[column]) for row in clean)) for column in range(len(clean[0]))]
    head, *body = [" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in clean]
    rule = "|".join("-" * (width + 2) for width in widths)
    return [f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in body)]


def _one_line(cell: str) -> str:
    shown = cell if cell.isprintable() else repr(cell)[1:-1]
    return shown.replace("|", "\\|")


def failures(found: Sequence[Row]) -> list[str]:
    """Which runs failed, and why."""
    return [f"- {row.folder.name}: {' '.join(row.error.split())}" for row in found if row.status == "failed"]


def measured(found: Sequence[Row]) -> str:
    """What could be compared instead."""
    names = {key for row in found for line in row.lines for key, value in line.items() if isinstance(value, float)}
    return f"What they have: {', '.join(sorted(names))}" if names else "They have no metrics yet."


def command(row: Row) -> str:
    """What to type for such a run, in a folder of its own."""
    return shlex.join(["loomtune", "train", *row.typed])


def html(title: str, found: Sequence[Row], keys: Sequence[str], made: Sequence[Group], goal: Goal) -> str:
    """One page that needs nothing beside it."""
    chosen = [key for key in keys if key != "seed"][:_FEW]
    known = {key: points for key in chosen if (points := _points(found, key))}
    across = [(f"{goal.metric} by {key}", charts.against(key, points)) for key, points in known.items()]
    return page.document(
        title,
        page.heading(title, f"{goal.mode} {goal.metric}", None),
        _rows("Runs", table(found, keys, goal)),
        _rows("Over seeds", over_seeds(made, goal)),
        _wide(_curves(found, keys, goal)),
        page.figures("What was varied", across),
        page.table("Failures", {row.folder.name: row.error for row in found if row.status == "failed"}, folded=False),
    )


def _points(found: Sequence[Row], key: str) -> list[tuple[Any, float]]:
    known = [(row.setting(key), row.value) for row in found if row.value is not None and math.isfinite(row.value)]
    return [(value if isinstance(value, int | float) else said(value), of) for value, of in known]


def _curves(found: Sequence[Row], keys: Sequence[str], goal: Goal) -> list[tuple[str, str]]:
    """All runs in one plot: of the metric, and of the loss where that is another."""
    drawn = []
    for one in dict.fromkeys([goal, Goal("loss")]):
        curves = {_label(row, keys): _finite(one.curve(row.lines)) for row in found}
        if known := {label: curve for label, curve in curves.items() if curve}:
            drawn.append((one.metric, charts.together(one.metric, known)))
    return drawn


def _label(row: Row, keys: Sequence[str]) -> str:
    varied = " ".join(f"{key.rpartition('.')[2]}={said(row.setting(key))}" for key in keys)
    return f"{varied or row.folder.name} ({row.folder.name[:6]})"


def _finite(curve: Mapping[int, float]) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in curve.items() if math.isfinite(value)]


def _rows(title: str, cells: Cells) -> str:
    if not cells:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in cells[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells[1:])
    return f"<section><h2>{escape(title)}</h2><table><thead><tr>{head}</tr></thead>{body}</table></section>"


def _wide(drawn: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in drawn)
    return f"<section><h2>Curves</h2>{cells}</section>" if drawn else ""
