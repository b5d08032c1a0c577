"""What a sweep is after: a metric, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune.errors import UserError
from loomtune.plan import Plan

MODES = ("min", "max")
_LESS_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True, slots=True)
class Goal:
    """A metric. mode: whether `min` or `max` of it is best."""

    metric: str = "loss"
    mode: str = "min"

    def better(self, one: float, other: float) -> bool:
        """True where one value is better than another; NaN is better than none."""
        return one > other if self.mode == "max" else one < other

    def rank(self, value: float | None) -> tuple[bool, float]:
        """Sorts the best first, and what has no value last."""
        if value is None or math.isnan(value):
            return True, 0.0
        return False, -value if self.mode == "max" else value

    def of(self, metrics: Mapping[str, Any]) -> float | None:
        """The value among metrics; None where it is not there, or no number."""
        value = metrics.get(self.metric)
        return float(value) if isinstance(value, int | float) else None

    def curve(self, lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        """The value after each step that has one. What is not finite counts as the worst."""
        worst = float("-inf" if self.mode == "max" else "inf")
        found = {}
        for line in lines:
            value = worst if self.metric in line.get("nonfinite", ()) else self.of(line)
            if value is not None and line.get("step", 0) > 0:
                found[int(line["step"])] = value
        return found


def chosen(metric: str, mode: str, direction: str, plan: Plan | None) -> Goal:
    """The goal that was set, else what the plan keeps its best checkpoint by, else the held-out loss, else the loss.

    direction: a sweeper's own `minimize` or `maximize`, empty where none was typed.
    Raises UserError where they contradict each other, or a metric does not say which way is better.
    """
    typed = {"minimize": "min", "maximize": "max"}.get(direction, direction)
    for key, value in (("hydra.launcher.mode", mode), ("hydra.sweeper.direction", typed)):
        if value and value not in MODES:
            raise UserError.of(f"{key}={value} is unknown", "a sweep is after the min or the max of one metric")
    if mode and typed and mode != typed:
        what = f"hydra.launcher.mode={mode} and hydra.sweeper.direction={direction} contradict each other"
        raise UserError.of(what, "leave one of them out")
    found = _by_plan(plan)
    if metric and metric != found.metric:
        found = Goal(metric, "min" if metric.endswith(_LESS_IS_BETTER) else "")
    mode = mode or typed or found.mode
    if not mode:
        what = f"hydra.launcher.metric={found.metric} does not say whether more or less of it is better"
        raise UserError.of(what, "set hydra.launcher.mode=max, or min")
    return Goal(found.metric, mode)


def _by_plan(plan: Plan | None) -> Goal:
    if plan is None:
        return Goal()
    if best := plan.root.evaluate.best:
        return Goal(best, plan.root.evaluate.mode)
    return Goal("heldout_loss" if "heldout" in plan.choices("evaluator") else "loss")
