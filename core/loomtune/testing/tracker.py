"""Checks of trackers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Tracker

if TYPE_CHECKING:
    from loomtune.run import Run

METRICS: Mapping[str, float] = {
    "loss": 1.0,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens": 8.0,
    "tokens_seen": 8.0,
    "seconds": 0.1,
    "tokens_per_second": 80.0,
    "memory_bytes": 1e6,
}


Make = Callable[[], Tracker]


def check_tracker(make: Make, folder: Path, beside: Mapping[str, Make] | None = None) -> None:
    """Tells new trackers the stories of runs: one that completes, one that goes on from it, one that fails at once.

    Checks that a tracker bears every event, numbers that are not finite included, and says where its record is.
    beside: the trackers that it needs, by name; they are told first.
    """
    for name, story in (("run", _completed), ("run", _resumed), ("failed", _failed)):
        from loomtune.testing import toy

        tracker, place = make(), folder / name
        place.mkdir(parents=True, exist_ok=True)
        run = toy.run(
            place, {**{other: make_other() for other, make_other in (beside or {}).items()}, "checked": tracker}
        )
        story(run)
        assert not run.events.broken, f"the tracker failed: {run.events.broken}"
        said = tracker.describe(run)
        assert said and "\n" not in said, f"describe gives one line, not {said!r}"


def _step(run: Run, step: int, **more: float) -> None:
    run.step = step
    run.metrics |= {**METRICS, **more}
    run.events.tell("step_started", run=run, step=step)
    run.events.tell("rollout_finished", run=run, step=step, samples=[{"prompt": "a", "completion": "b", "reward": 1.0}])
    run.events.tell("step_finished", run=run, step=step, metrics={**METRICS, **more})


def _completed(run: Run) -> None:
    tell, path = run.events.tell, run.folder / "checkpoints" / "step-00000002"
    tell("run_started", run=run)
    tell("model_ready", run=run)
    tell("evaluated", run=run, step=0, metrics={"heldout_loss_before": 2.0})
    _step(run, 1)
    _step(run, 2, loss=math.nan, grad_norm=math.inf)
    tell("evaluated", run=run, step=2, metrics={"heldout_loss": 1.5})
    tell("checkpoint_saved", run=run, path=path, step=2)
    tell("exported", folder=run.folder, path=run.folder / "export")
    tell("run_finished", run=run, status="completed")


def _resumed(run: Run) -> None:
    tell, path = run.events.tell, run.folder / "checkpoints" / "step-00000001"
    tell("run_started", run=run)
    tell("checkpoint_loaded", run=run, path=path, step=1)
    tell("model_ready", run=run)
    _step(run, 2)
    tell("run_finished", run=run, status="preempted")


def _failed(run: Run) -> None:
    run.events.tell("run_started", run=run)
    run.events.tell("run_failed", run=run, error=RuntimeError("out of memory"))
    run.events.tell("run_finished", run=run, status="failed")
