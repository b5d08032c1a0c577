"""What a training model says, on the processes and in the layout in which it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loomtune.loop import Loop
from loomtune.world import World
from runs.ranks import assembled

TOKENS = [[1, 40, 77, 130, 5, 200, 9, 33], [7, 7, 90, 255, 2, 18, 64, 101]]


def logits(model: Any) -> torch.Tensor:
    """Of a causal language model for fixed tokens: `(2, 8, vocabulary)`."""
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor(TOKENS)).logits
    return out


def trained(world: World, folder: Path) -> Any:
    """Trains the run of a prepared folder to its end, and gives the logits of the model that it leaves."""
    assembly = assembled(world, folder)
    assembly.build_roles()
    Loop(assembly.run, assembly.keeper).train()
    with assembly.run.policy.engine.gathered() as module:
        return logits(module).numpy()
