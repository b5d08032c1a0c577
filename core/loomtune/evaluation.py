"""Running the evaluators, and what their metrics decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from loomtune.errors import RunFailed, near
from loomtune.run import Run
from loomtune.settings import EvaluateSettings
from loomtune.world import derive, reseed


def evaluate(run: Run, suffix: str = "") -> dict[str, float]:
    """All evaluators' metrics of the model as it is; equal on every rank. suffix: appended to their names.

    Raises Preempted, with nothing told or kept, where a rank is asked to leave meanwhile.
    """
    metrics: dict[str, float] = {}
    # What is sampled depends on no step before, and does not repeat what an online objective sampled in this one.
    reseed(derive(run.settings.seed, "evaluate"), run.step, run.world.replica)
    with ExitStack() as stack:
        for engine in dict.fromkeys(role.engine for role in run.roles.values()):
            stack.enter_context(engine.evaluating())
        for evaluator in run.evaluators.values():
            run.heed()
            metrics |= {f"{name}{suffix}": float(value) for name, value in evaluator.evaluate(run).items()}
    if metrics:
        run.metrics |= metrics
        run.events.tell("evaluated", run=run, step=run.step, metrics=metrics)
    return metrics


class Best:
    """Remembers the best value of one metric, and for how many evaluations there was no better one."""

    def __init__(self, settings: EvaluateSettings, state: Mapping[str, Any] | None) -> None:
        self.metric, self.patience = settings.best, settings.patience
        self.sign = 1.0 if settings.mode == "min" else -1.0
        self.value: float | None = state["value"] if state else None
        self.since: int = state["since"] if state else 0
        self.step: int = state["step"] if state else 0

    def update(self, metrics: Mapping[str, float], step: int) -> tuple[bool, bool]:
        """(this is the best so far, patience is at its end)."""
        if not self.metric:
            return False, False
        if self.metric not in metrics:
            known = ", ".join(metrics)
            raise RunFailed(
                f"evaluate.best={self.metric} was not measured.{near(self.metric, metrics)} There are: {known}"
            )
        value = metrics[self.metric]
        better = not math.isnan(value) and (self.value is None or self.sign * value < self.sign * self.value)
        if better:
            self.value, self.since, self.step = value, 0, step
        else:
            self.since += 1
        return better, bool(self.patience) and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"value": self.value, "since": self.since, "step": self.step}
