"""Work for ranks: a run is trained to its end, and what its networks hold in memory is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from loomtune.loop import Loop
from loomtune.world import World
from runs.ranks import assembled
from runs.writing import Listener


def counted(folder: Path, world: World) -> dict[str, Any]:
    """Roles, how many engines serve them, and bytes of distinct storages on this rank: of all parameters, of those that
    the policy's base has, and of the optimizers' state."""
    assembly = assembled(world, folder)
    assembly.run.events.manager.register(listener := Listener())
    assembly.build_roles()
    Loop(assembly.run, assembly.keeper).train()
    roles = assembly.run.roles
    engines: list[Any] = list({role.engine for role in roles.values()})
    parameters = [one for engine in engines for one in engine.network.parameters()]
    states = [engine.optimizer.state.values() for engine in engines if engine.optimizer is not None]
    kept = [tensor for each in states for state in each for tensor in state.values() if isinstance(tensor, Tensor)]
    found = {"metrics": {}, "lines": listener.lines, "roles": sorted(roles), "engines": len(engines)}
    found |= {"parameters": _bytes(parameters), "states": _bytes(kept)}
    for engine in engines:
        engine.close()
    return found


def _bytes(tensors: list[Any]) -> int:
    """Of the storages behind tensors, each counted once."""
    behind = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(behind.values())
