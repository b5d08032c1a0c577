"""A trained run, opened on this one process to be measured or talked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loomtune import checkpoint, inputs
from loomtune import world as worlds
from loomtune.assembly import assemble
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.probe import check_isolation
from loomtune.run import Run


@contextmanager
def opened(plan: Plan, folder: Path, *, best: bool = False) -> Iterator[Run]:
    """The run with the weights of its latest, or best, checkpoint. Nothing in the folder changes.

    Raises UserError where there is none, and where files that the run began from were changed.
    """
    checkpoints = folder / "checkpoints"
    path = checkpoint.best(checkpoints) if best else checkpoint.latest(checkpoints)
    if path is None:
        raise UserError.of(
            f"{folder} has no {'best ' if best else ''}checkpoint", "train it first, or name another run"
        )
    catalogue = installed()
    inputs.check(folder, inputs.fingerprints(plan, catalogue))
    world = worlds.join()
    try:
        assembly = assemble(plan, folder, catalogue, world, Lease(folder, "reading"), observed=False)
        assembly.build_roles(trains=False)
        assembly.keeper.load(path, Plan.load(folder).hash)
        if plan.root.packing:
            check_isolation(assembly.run)
        yield assembly.run
    finally:
        worlds.leave()
