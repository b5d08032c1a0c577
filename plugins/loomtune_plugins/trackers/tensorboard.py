"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune_plugins.trackers.settings import TensorBoardSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from loomtune.run import Run


class TensorBoard(Tracker):
    """Event files. A resumed run tells TensorBoard to forget the steps that were not committed."""

    def __init__(self, settings: TensorBoardSettings) -> None:
        self._settings = settings
        self._writer: SummaryWriter | None = None
        self._purge: int | None = None

    @hookimpl
    def checkpoint_loaded(self, run: Run, path: Path, step: int) -> None:
        """Remembers from which step on older events are void."""
        self._purge = step + 1

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

    def _write(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder(run)), purge_step=self._purge)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
