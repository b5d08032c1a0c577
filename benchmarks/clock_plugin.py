"""The clock as a plugin of loomtune, like anybody's: it hears when a step ends."""

from __future__ import annotations

from typing import Any

from clock import CLOCK

from loomtune import hookimpl

SAID = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


@hookimpl
def step_finished(run: Any, step: int, metrics: Any) -> None:
    CLOCK.mark(run.settings.batch.size, **{name: metrics[name] for name in SAID if name in metrics})


@hookimpl
def run_finished(run: Any, status: str) -> None:
    CLOCK.write()
