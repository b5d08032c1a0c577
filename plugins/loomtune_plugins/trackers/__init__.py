"""Records of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune.offers import Offer, Trait
from loomtune_plugins.trackers.settings import (
    ConsoleSettings,
    JsonlSettings,
    ReportSettings,
    TensorBoardSettings,
    UsageSettings,
    WandbSettings,
)
from loomtune_plugins.trackers.usage import window

if TYPE_CHECKING:
    from loomtune.plan import Finding, Plan


@hookimpl
def trackers() -> Sequence[Offer[Tracker]]:
    """Gives the built-in trackers."""
    return (
        Offer(
            name="jsonl",
            build="loomtune_plugins.trackers.jsonl:Jsonl",
            schema=JsonlSettings,
            summary="metrics.jsonl: one line for each step, cut back on resume",
            provides=frozenset({Trait.METRICS_FILE}),
        ),
        Offer(
            name="console",
            build="loomtune_plugins.trackers.console:Console",
            schema=ConsoleSettings,
            summary="a progress bar on a terminal, plain lines elsewhere, a table at the end",
        ),
        Offer(
            name="wandb",
            build="loomtune_plugins.trackers.wandb:Wandb",
            schema=WandbSettings,
            summary="Weights & Biases, online or offline; a resumed run stays one run",
        ),
        Offer(
            name="tensorboard",
            build="loomtune_plugins.trackers.tensorboard:TensorBoard",
            schema=TensorBoardSettings,
            summary="TensorBoard event files in RUN/tensorboard",
        ),
        Offer(
            name="report",
            build="loomtune_plugins.trackers.report:Report",
            schema=ReportSettings,
            summary="report.html: curves, before and after, settings, on one page without links",
            needs=frozenset({Trait.METRICS_FILE}),
        ),
        Offer(
            name="usage",
            build="loomtune_plugins.trackers.usage.tracker:Usage",
            schema=UsageSettings,
            summary="time by phase, waiting, MFU and peaks of memory in each step's metrics; traces (`profile.steps`)",
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Refuses a `profile.steps` that names no steps, or that nobody traces."""
    return window.findings(plan.root, list(plan.choices("tracker")))
