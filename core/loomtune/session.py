"""A run on this one process: a trained one, to be measured or talked to, and one that might be, to be looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from loomtune import checkpoint, inputs
from loomtune import world as worlds
from loomtune.assembly import assemble
from loomtune.batching import micro_limit, step_batches
from loomtune.catalogue import installed
from loomtune.contracts import Batch
from loomtune.errors import UserError
from loomtune.feed import Feed
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.probe import check_isolation
from loomtune.run import Run
from loomtune.tokenising import tokenise


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
        check_isolation(assembly.run)
        yield assembly.run
    finally:
        worlds.leave()


def looked_at(plan: Plan) -> Run:
    """What a plan's first rank would be, its samples made and cached, without any network and without a folder."""
    catalogue, world = installed(), worlds.World(0, plan.training(plan.processes), 0, torch.device("cpu"))
    with TemporaryDirectory() as folder:
        (Path(folder) / "samples.json").write_text(json.dumps(tokenise(plan, catalogue, tell_cuts=False)))
        return assemble(plan, Path(folder), catalogue, world, Lease(Path(folder), "looking"), observed=False).run


def drawn(run: Run, split: str) -> Iterator[list[int]]:
    """The rows of each step: of `train` in the order of the run, without end; of another split in its own, once."""
    feed, size, count = Feed(run), run.settings.batch.size, len(run.splits[split])
    while split == "train":
        yield [one.row for one in feed.draw()]
    yield from (list(range(start, min(start + size, count))) for start in range(0, count, size))


def collated(run: Run, split: str, rows: Sequence[int]) -> list[Batch]:
    """A step of these rows as every rank's micro-batches, one rank after the other.

    Its `sample_numbers` are places among the rows. What an objective has its model write before a step is not there.
    """
    samples = run.objective.together([run.splits[split][row] for row in rows], run.max_length)
    ranks = [replace(run, world=replace(run.world, replica=replica)) for replica in range(run.world.replicas)]
    return [batch for one in ranks for batch in step_batches(one, samples, range(len(rows)), micro_limit(one))]
