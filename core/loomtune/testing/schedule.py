"""Checks of learning-rate schedules."""

from __future__ import annotations

import math

from loomtune.contracts import Schedule

LENGTHS = (1, 2, 10, 101)


def check_schedule(schedule: Schedule) -> None:
    """Checks that a factor is a pure function of the step, lies in [0, 1], and that no run is spent at a rate of 0."""
    for steps in LENGTHS:
        factors = [schedule.factor(step, steps) for step in range(1, steps + 1)]
        backwards = [schedule.factor(step, steps) for step in range(steps, 0, -1)][::-1]
        assert factors == backwards, f"of {steps} steps: the factor depends on what was asked before"
        assert all(math.isfinite(factor) and 0 <= factor <= 1 for factor in factors), f"of {steps} steps: {factors}"
        assert any(factor > 0 for factor in factors), f"of {steps} steps: nothing would be learned"
