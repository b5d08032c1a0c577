"""metrics.csv."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune.errors import UserError
from loomtune_acme.settings import CsvSettings

if TYPE_CHECKING:
    from loomtune.run import Run


class Csv(Tracker):
    """One row for each step. It lives on rank 0 alone, as trackers do unless they set `every_rank`."""

    def __init__(self, settings: CsvSettings) -> None:
        if len(settings.separator) != 1:
            raise UserError.of(f"tracker.csv.separator={settings.separator!r} is not one character", "set it to ';'")
        self._separator = settings.separator

    @hookimpl
    def checkpoint_loaded(self, run: Run, path: Path, step: int) -> None:
        """Drops the rows of steps that were not committed: the resumed run makes them again."""
        if (file := run.folder / "metrics.csv").is_file():
            head, *rows = file.read_text().splitlines(keepends=True)
            kept = [row for row in rows if int(row.split(self._separator)[0]) <= step]
            file.write_text("".join([head, *kept]))

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row, and the head before the first one."""
        file = run.folder / "metrics.csv"
        fresh = step == 1 or not file.is_file()
        with file.open("w" if fresh else "a", newline="") as opened:
            writer = csv.writer(opened, delimiter=self._separator)
            if fresh:
                writer.writerow(["step", *metrics])
            writer.writerow([step, *metrics.values()])

    def describe(self, run: Run) -> str:
        """Where the rows are."""
        return f"metrics as CSV: {run.folder / 'metrics.csv'}"
