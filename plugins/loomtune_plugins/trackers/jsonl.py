"""metrics.jsonl, and what was generated meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune.errors import Fault, UserError
from loomtune_plugins.trackers.metrics import MetricsLog
from loomtune_plugins.trackers.rollouts import Rollouts
from loomtune_plugins.trackers.settings import JsonlSettings

if TYPE_CHECKING:
    from loomtune.run import Run


class Jsonl(Tracker):
    """One line for each step, with the results of an evaluation that followed it.

    A fresh run starts an empty file, a resumed one goes on after the committed step.
    """

    def __init__(self, settings: JsonlSettings) -> None:
        _check(settings)
        self._settings = settings
        self._log: MetricsLog | None = None

    def _of(self, run: Run) -> MetricsLog:
        """The log; what an attempt without a checkpoint left is dropped, for the run starts again at step 1."""
        return self._log or self._cut(run, -1)

    def _cut(self, run: Run, step: int) -> MetricsLog:
        self._log = MetricsLog(run.folder)
        self._log.cut(step)
        self._rollouts(run).cut(step)
        return self._log

    def _rollouts(self, run: Run) -> Rollouts:
        return Rollouts(run.folder, self._settings.rollouts, self._settings.rollout_files)

    @hookimpl
    def checkpoint_loaded(self, run: Run, path: Path, step: int) -> None:
        """Drops the lines of steps that were not committed, and what was generated for them."""
        self._cut(run, step)

    @hookimpl
    def rollout_finished(self, run: Run, step: int, samples: Sequence[Mapping[str, object]]) -> None:
        """Keeps some of a batch's completions."""
        self._of(run)
        self._rollouts(run).write(step, samples)

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the step's line."""
        self._of(run).append({"step": step, **metrics})

    @hookimpl
    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Adds to the step's line; step 0 gets one of its own."""
        log = self._of(run)
        if log.step == step:
            log.amend(metrics)
        else:
            log.append({"step": step, **metrics})

    @hookimpl
    def checkpoint_saved(self, run: Run, path: Path, step: int) -> None:
        """Makes the lines of a committed step as durable as the checkpoint."""
        self._of(run).sync()
        self._rollouts(run).sync()

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Closes the file."""
        if self._log is not None:
            self._log.sync()
            self._log.close()

    def describe(self, run: Run) -> str:
        """Where the lines are."""
        return f"metrics: {run.folder / 'metrics.jsonl'}"


def _check(settings: JsonlSettings) -> None:
    faults = []
    if settings.rollouts < -1:
        what = f"tracker.jsonl.rollouts={settings.rollouts} is no number of completions"
        faults.append(Fault(what, "set tracker.jsonl.rollouts to 0 or more, or to -1 for all"))
    if settings.rollout_files < 0 or settings.rollout_files == 1:
        what = f"tracker.jsonl.rollout_files={settings.rollout_files} does not hold the first batch and the newest"
        faults.append(Fault(what, "set tracker.jsonl.rollout_files to 2 or more, or to 0 for all"))
    if faults:
        raise UserError(*faults)
