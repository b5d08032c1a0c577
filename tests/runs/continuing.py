"""A run that is trained to its end and then continues prompts, on the processes and in the layout of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loomtune.contracts import Sampling
from loomtune.loop import Loop
from loomtune.world import World
from runs.ranks import assembled

PROMPTS = [[1, 40, 77, 130, 5], [1, 7, 90, 255], [33]]
"""Of several lengths, so that some are padded, and so many that a rank of two has more than the other."""

COUNT = 12
"""Tokens of each completion."""


def continued(folder: Path, world: World) -> dict[str, Any]:
    """Trains the run of a prepared folder, and says how its model goes on, greedily."""
    assembly = assembled(world, folder)
    assembly.build_roles()
    Loop(assembly.run, assembly.keeper).train()
    drawn = assembly.run.generate(PROMPTS, Sampling(max_tokens=COUNT))
    for role in assembly.run.roles.values():
        role.engine.close()
    return {"metrics": {}, "drawn": drawn}
