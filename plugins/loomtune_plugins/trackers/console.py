"""The terminal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune.errors import UserError
from loomtune_plugins.lines import read
from loomtune_plugins.measured import BEFORE, Measured, before_and_after, by_step
from loomtune_plugins.trackers.settings import ConsoleSettings
from loomtune_plugins.trackers.trained import lines

if TYPE_CHECKING:
    from rich.console import Console as Screen
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from loomtune.run import Run

SHOWN = {"loss": ".4f", "grad_norm": ".3g", "lr": ".2e", "tokens_per_second": ",.0f", "mfu": ".1%"}
_RECENT = 0.1
"""Weight of the last step in the mean seconds a step, from which the time to go is foretold."""


class Console(Tracker):
    """A progress bar where there is a terminal, one line every few steps where there is none, a table at the end."""

    def __init__(self, settings: ConsoleSettings) -> None:
        if settings.every < 1:
            raise UserError.of(f"tracker.console.every={settings.every} is less than 1", "set tracker.console.every=10")
        self._every = settings.every
        self._screen: Screen | None = None
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._seconds: float | None = None
        self._evaluated: dict[int, dict[str, float]] = {}

    @hookimpl
    def checkpoint_loaded(self, run: Run, path: Path, step: int) -> None:
        """Says from where the run goes on, and recalls what was measured until then."""
        self._evaluated = by_step([line for line in read(run.folder) if line.get("step", 0) <= step])
        self._say(f"goes on after step {step} from {path}")

    @hookimpl
    def model_ready(self, run: Run) -> None:
        """Says what is trained, of every network that is."""
        weights = run.model.weights(run.settings.seed).shapes()
        for engine in run.trained_engines():
            served = [name for name, role in run.roles.items() if role.engine is engine]
            for line in lines(engine.trained(), weights):
                self._say(line if served == ["policy"] or line[0] == " " else f"{', '.join(served)}: {line}")

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar, or writes a line for the first step, the last, and every few in between."""
        last = last_step(run)
        self._reckon(metrics.get("seconds"))
        left = "" if self._seconds is None else str(timedelta(seconds=round((last - step) * self._seconds)))
        if self._terminal().is_terminal:
            self._move(step, last, _numbers(metrics), left)
        elif step in (1, last) or step % self._every == 0:
            self._say(f"step {step}/{last}  {_numbers(metrics)}" + (f"  {left} to go" if left else ""))

    @hookimpl
    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Says the results."""
        self._evaluated.setdefault(step, {}).update(metrics)
        results = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._say(f"{f'after step {step}' if step else 'before training'}: {results}")

    @hookimpl
    def exported(self, folder: Path, path: Path) -> None:
        """Says where the model is."""
        self._say(f"model: {path}")

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Ends the bar; a table of what the run changed, and where all of it is."""
        if self._progress is not None:
            self._progress.stop()
        if self._evaluated:
            self._terminal().print(_table(self._measured()))
        self._say(f"{status} after step {run.step} of {run.steps}; everything is in {run.folder}")
        for tracker in run.trackers.values():
            if tracker is not self:
                self._say(tracker.describe(run))

    def describe(self, run: Run) -> str:
        """Here."""
        return "console: above"

    def _measured(self) -> list[Measured]:
        lines = [{"step": step, **metrics} for step, metrics in sorted(self._evaluated.items())]
        names = dict.fromkeys(name.removesuffix(BEFORE) for metrics in self._evaluated.values() for name in metrics)
        return before_and_after(lines, names)

    def _terminal(self) -> Screen:
        if self._screen is None:
            from rich.console import Console as Screen

            self._screen = Screen(highlight=False, soft_wrap=True)
        return self._screen

    def _say(self, line: str) -> None:
        self._terminal().print(line, markup=False)

    def _reckon(self, seconds: float | None) -> None:
        if seconds is not None:
            self._seconds = seconds if self._seconds is None else (1 - _RECENT) * self._seconds + _RECENT * seconds

    def _move(self, step: int, last: int, numbers: str, left: str) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self._progress = Progress(*columns, console=self._terminal(), refresh_per_second=4)
            self._bar = self._progress.add_task("", total=last)
            self._progress.start()
        assert self._bar is not None
        self._progress.update(self._bar, completed=step, description=f"{left} to go  {numbers}" if left else numbers)


def last_step(run: Run) -> int:
    """The step after which this attempt ends."""
    return min(run.steps, run.settings.stop_after or run.steps)


def _numbers(metrics: Mapping[str, float]) -> str:
    shown = ((name.replace("tokens_per_second", "tokens/s"), metrics.get(name), form) for name, form in SHOWN.items())
    return "  ".join(f"{name} {value:{form}}" for name, value, form in shown if value is not None)


def _table(measured: list[Measured]) -> Table:
    from rich.table import Table

    table = Table("evaluation", title_justify="left")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for entry in measured:
        known = entry.before is not None and entry.after is not None
        change = f"{entry.after - entry.before:+.4g}" if known else ""  # type: ignore[operator]
        table.add_row(entry.name, _number(entry.before), _number(entry.after), change)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
