"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune_plugins.trackers import rollouts
from loomtune_plugins.trackers.settings import TensorBoardSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from loomtune.run import Run

LONGEST = 4_000
"""Characters of a text."""


class TensorBoard(Tracker):
    """Event files. A resumed run tells TensorBoard to forget the steps that were not committed."""

    def __init__(self, settings: TensorBoardSettings) -> None:
        self._settings = settings
        self._writer: SummaryWriter | None = None
        self._purge: int | None = None
        self._shown: int | None = None

    @hookimpl
    def checkpoint_loaded(self, run: Run, path: Path, step: int) -> None:
        """Remembers from which step on older events are void."""
        self._purge = step + 1

    @hookimpl
    def rollout_finished(self, run: Run, step: int, samples: Sequence[Mapping[str, object]]) -> None:
        """Shows the best and the worst completions of a batch, every few steps."""
        settings, last = self._settings, self._shown
        if not settings.rollouts or (last is not None and 0 <= step - last < settings.rollout_every):
            return
        self._shown = step
        rows = [rollouts.cells(step, row, LONGEST) for row in rollouts.telling(samples, settings.rollouts)]
        self._opened(run).add_text("rollouts", "\n\n---\n\n".join(map(_text, rows)), step)

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the step's metrics."""
        self._write(run, step, metrics)

    @hookimpl
    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Writes an evaluation's metrics."""
        self._write(run, step, metrics)

    @hookimpl
    def checkpoint_saved(self, run: Run, path: Path, step: int) -> None:
        """Brings what belongs to a committed step to the file."""
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def describe(self, run: Run) -> str:
        """How to look at it."""
        return f"tensorboard --logdir {self._folder(run)}"

    def _folder(self, run: Run) -> Path:
        return Path(self._settings.dir) if self._settings.dir else run.folder / "tensorboard"

    def _opened(self, run: Run) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder(run)), purge_step=self._purge)
        return self._writer

    def _write(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._opened(run)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)


def _text(cells: Sequence[str]) -> str:
    """A completion as TensorBoard's Markdown, in which an indented line stands as it is."""
    said = zip(rollouts.COLUMNS[1:], cells[1:], strict=True)
    lines = [f"{name}: {cell}".splitlines() for name, cell in said if cell]
    return "\n".join(f"    {line}" for part in lines for line in part)
