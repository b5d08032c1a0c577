"""What a report shows of completions that were learned from: curves, and a few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loomtune_plugins import page
from loomtune_plugins.charts import curves
from loomtune_plugins.trackers import rollouts

CURVES = {
    "rewards/mean": "Reward",
    "kl": "KL to the reference, per token",
    "entropy": "Entropy, per token",
    "completions/mean_length": "Length, in tokens",
    "completions/ended": "Share of completions that ended",
    "clip/low": "Share of tokens clipped below",
    "clip/high": "Share of tokens clipped above",
    "pairs/share": "Share of prompts with a pair",
    "groups/equal": "Share of groups with equal rewards",
}
"""What is looked at first, by the names that objectives give it."""

SHOWN, LONGEST = 4, 2_000
"""Completions of a batch on the page, and characters of a text."""


def learns_online(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether steps learned from completions."""
    return any("rewards/mean" in line for line in lines)


def drawn(lines: Sequence[Mapping[str, Any]], points: int) -> str:
    """The curves of what was generated."""
    return page.figures("Completions", curves(lines, CURVES, points)) if learns_online(lines) else ""


def some(folder: Path) -> str:
    """Of the first batch that is kept, a middle one and the last: the best and the worst completions."""
    files = rollouts.files(folder)
    chosen = dict.fromkeys([files[0], files[len(files) // 2], files[-1]]) if files else {}
    return "".join(_batch(path) for path in chosen)


def _batch(path: Path) -> str:
    step = rollouts.step_of(path)
    shown = [rollouts.cells(step, row, LONGEST) for row in rollouts.telling(rollouts.rows(path), SHOWN)]
    headings = [name for name in rollouts.COLUMNS if name != "step"]
    return page.grid(f"Completions before step {step}", headings, [cells[1:] for cells in shown])
