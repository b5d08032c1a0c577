"""metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune_plugins.trackers.metrics import MetricsLog
from loomtune_plugins.trackers.settings import JsonlSettings

if TYPE_CHECKING:
    from loomtune.run import Run


class Jsonl(Tracker):
    """One line for each step, with the results of an evaluation that followed it.

    A fresh run starts an empty file, a resumed one goes on after the committed step.
    """

    def __init__(self, settings: JsonlSettings) -> None:
        self._log: MetricsLog | None = None

    def _of(self, run: Run) -> MetricsLog:
        """The log; what an attempt without a checkpoint left is dropped, for the run starts again at step 1."""
        if self._log is None:
            self._log = MetricsLog(run.folder)
            self._log.cut(-1)
        return self._log

    @hookimpl
    def checkpoint_loaded(self, run: Run, path: Path, step: int) -> None:
        """Drops the lines of steps that were not committed."""
        self._log = MetricsLog(run.folder)
        self._log.cut(step)

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

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Closes the file."""
        if self._log is not None:
            self._log.sync()
            self._log.close()

    def describe(self, run: Run) -> str:
        """Where the lines are."""
        return f"metrics: {run.folder / 'metrics.jsonl'}"
