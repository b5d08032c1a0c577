"""The clock as a plugin of loomtune, like anybody's: it hears when a step ends."""

from __future__ import annotations

from typing import Any

from clock import CLOCK

from loomtune import hookimpl


@hookimpl
def step_finished(run: Any, step: int, metrics: Any) -> None:
    CLOCK.mark(metrics["loss"], run.settings.batch.size)


@hookimpl
def run_finished(run: Any, status: str) -> None:
    CLOCK.write()
