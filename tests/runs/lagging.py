"""Work for ranks: a run in which the last rank comes late to every step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from loomtune.plan import Plan
from loomtune.stepping import Stepper
from loomtune.worker import execute
from loomtune.world import World

LATE = 0.4
"""Seconds."""


def late(folder: Path, world: World) -> dict[str, Any]:
    """Trains the run of a folder; its result."""
    totals = Stepper.totals

    def slow(self: Stepper, batches: Any) -> Any:
        found = totals(self, batches)  # every rank has heard of the others here, and goes on alone
        time.sleep(LATE if world.rank == world.size - 1 else 0.0)
        return found

    with patch.object(Stepper, "totals", slow):
        return execute(Plan.load(folder), folder, world)
