"""Observers that record a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pathlib import Path

    from loomtune.run import Run


class Tracker(ABC):
    """Records a run by implementing event hooks (`loomtune.hookspecs`) as methods marked `@hookimpl`.

    A tracker lives on rank 0 unless it says otherwise. It may fail: the run goes on and says once which one failed.
    """

    every_rank: ClassVar[bool] = False

    @abstractmethod
    def describe(self, run: Run) -> str:
        """One line on where the record can be seen, shown at the end of a run."""

    def redraw(self, folder: Path) -> Path | None:
        """Makes a report anew from the files of a run's folder, for `loomtune report`; None where it draws none."""
        return None
