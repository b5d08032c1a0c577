"""The median rule: an item that is worse than half of the others at the same step is not worth its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

from loomtune_plugins.commands.sweeps.goal import Goal

LEAST = 3
"""So many others must have come as far: fewer say little about what is usual."""

Curve = Mapping[int, float]


def hopeless(mine: Curve, others: Iterable[Curve], after: int, goal: Goal) -> bool:
    """True where the last value, after at least so many steps, is worse than the median of the others' there.

    Golovin et al. 2017 (Vizier), section 3.2.2, with the value itself in place of its running mean.
    """
    step = max(mine, default=0)
    if step < after:
        return False
    there = [curve[step] for curve in others if step in curve]
    return len(there) >= LEAST and goal.better(median(there), mine[step])
