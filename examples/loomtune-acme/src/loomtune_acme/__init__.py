"""What acme adds to loomtune. Importing this module imports no torch: it only says what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loomtune import hookimpl
from loomtune.contracts import Objective, Tracker
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_acme.settings import CsvSettings, FocalSettings

if TYPE_CHECKING:
    from loomtune.run import Run


@hookimpl
def objectives() -> Sequence[Offer[Objective]]:
    """One objective."""
    return [
        Offer(
            name="focal",
            build="loomtune_acme.focal:Focal",
            schema=FocalSettings,
            summary="supervised fine-tuning that turns from what the model already knows",
            needs=frozenset({Trait.COMPLETIONS}),
        )
    ]


@hookimpl
def trackers() -> Sequence[Offer[Tracker]]:
    """One tracker."""
    return [
        Offer(
            name="csv",
            build="loomtune_acme.csv_tracker:Csv",
            schema=CsvSettings,
            summary="metrics.csv: one row for each step, for a spreadsheet",
        )
    ]


@hookimpl
def config_sources() -> Sequence[str]:
    """Where `recipe=acme_focal` lies."""
    return ["pkg://loomtune_acme.conf"]


@hookimpl
def preflight(plan: Plan) -> Sequence[Finding]:
    """Doubts a gamma that changes nothing; the run goes on, because `fatal` is False."""
    objective = plan.chosen("objective")
    if objective["name"] == "focal" and objective["gamma"] == 0:
        return [
            Finding("objective.gamma=0 is plain fine-tuning", "set objective.gamma=2, or objective=sft", fatal=False)
        ]
    return []


@hookimpl
def run_finished(run: Run, status: str) -> None:
    """Leaves a line in the run's folder. An event is told on every rank; only one of them writes."""
    if run.world.leads:
        (run.folder / "acme.txt").write_text(f"{status} at step {run.step} of {run.steps}\n")
