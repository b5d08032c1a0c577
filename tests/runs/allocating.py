"""A real run of a few steps on one rank, with the records of its allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from loomtune.assembly import Assembly
from loomtune.loop import Loop
from loomtune.micro import token_budget
from loomtune.probe import check_isolation
from loomtune.world import World
from runs.allocations import Recorder, Records
from runs.ranks import assembled

EXPLAINED = 40
"""Lines that say what was held."""


def measure(folder: Path, world: World, *, profiled: bool = False) -> dict[str, Any]:
    """Trains the steps of a prepared folder's plan as a worker does, recorded; the same answer on every rank.

    Gives each rank's peaks by moment, and what was held at the highest of them and at the end.
    profiled: also in which operations that was asked for.
    """
    return {"metrics": {}, "ranks": world.gather(_recorded(folder, world, profiled))}


def measure_device(folder: Path, world: World) -> dict[str, Any]:
    """The same on accelerators, whose allocators count by themselves: each rank's peak in bytes."""
    assembly = assembled(world, folder)
    torch.cuda.reset_peak_memory_stats(world.device)
    before = torch.cuda.memory_allocated(world.device)
    _train(assembly)
    return {"metrics": {}, "ranks": world.gather(torch.cuda.max_memory_allocated(world.device) - before)}


def _recorded(folder: Path, world: World, profiled: bool) -> dict[str, Any]:
    assembly = assembled(world, folder)
    recorder = Recorder(assembly.run.phases, profiled=profiled)
    gc.collect()
    with recorder() as records:
        _train(assembly, recorder.moment)
    return _plain(records)


def _train(assembly: Assembly, moment: Callable[[str], AbstractContextManager[None]] = nullcontext) -> None:
    """As a worker does: every role's birth, then all steps, without evaluations and checkpoints."""
    run = assembly.run
    with moment("birth"):
        assembly.build_roles()
    check_isolation(run)
    run.token_budget = token_budget(run)
    loop = Loop(run, assembly.keeper)
    for _ in range(run.steps):
        loop._fetch()
        loop._step(0.0)


def _plain(records: Records) -> dict[str, Any]:
    blocks = {"held": records.held, "left": records.left}
    said = {what: records.explained(these)[:EXPLAINED] for what, these in blocks.items()}
    return {"peak": records.peak, "peaks": dict(records.peaks), **said}
