"""The tracker that measures what a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune_plugins.trackers.settings import UsageSettings
from loomtune_plugins.trackers.usage.window import window

if TYPE_CHECKING:
    from loomtune.run import Run
    from loomtune_plugins.trackers.usage.tracing import Tracing


class Usage(Tracker):
    """Hears of phases (`Run.phases`) on every rank, and hands numbers to the step that ends (`Run.noted`).

    So other trackers record them among the step's metrics. What cannot be known is absent.
    """

    every_rank: ClassVar[bool] = True

    def __init__(self, settings: UsageSettings) -> None:
        self._tracing: Tracing | None = None

    @hookimpl
    def model_ready(self, run: Run) -> None:
        """Listens to the phases from here on; what traces hears of them first, so that no phase has its start in it."""
        from loomtune_plugins.trackers.usage.measuring import Measuring
        from loomtune_plugins.trackers.usage.tracing import Tracing

        if asked := window(run.settings.profile.steps):
            self._tracing = Tracing(run, *asked)
            run.phases.listeners.append(self._tracing)
        run.phases.listeners.append(Measuring(run))

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps what was traced once that is all, where no step's time has the writing in it."""
        if self._tracing is not None and step >= self._tracing.last:
            self._tracing.close()

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Keeps what was traced where the run ended before the last step that was asked for."""
        if self._tracing is not None:
            self._tracing.close()

    def describe(self, run: Run) -> str:
        """Where its numbers are, and traces."""
        traces = run.folder / "profile"
        return "usage: among the metrics of each step" + (f", traces in {traces}" if traces.is_dir() else "")
