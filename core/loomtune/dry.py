"""A step that is computed and dropped: it shows what memory a step takes, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from loomtune.batching import micro_limit, step_batches
from loomtune.checkpoint.files import replace_text
from loomtune.contracts import Batch, Objective
from loomtune.errors import UserError
from loomtune.run import Run
from loomtune.stepping import Stepper

NAME = "measured.json"
CURES = (
    "lower batch.micro or max_length; set sharding.activation_checkpointing=true, sharding.offload or precision=bf16; "
    "train less (adapter=lora) or shard over more ranks; `loomtune plan --search` lists what fits"
)


def dry_step(run: Run) -> None:
    """One step at the longest batch of the run, as `dry_step` says; its peak stands in `RUN/measured.json`.

    What the optimizer has yet to allocate is held meanwhile by a stand-in. Raises UserError where memory lacks, on
    every rank where it lacks; all compute the same rows, so ranks of like memory end alike, and launchers end the rest.
    """
    device, wanted = run.world.device, run.settings.dry_step
    if wanted == "never" or (wanted == "auto" and device.type == "cpu") or not imaginable(run):
        return
    with enough(run):
        held = torch.empty(state_to_come(run), dtype=torch.uint8, device=device)
        bytes = peak(run, longest(run))
        del held
    everywhere = run.world.gather(bytes)
    if run.world.leads:
        found = {"dry_step": {"peak_bytes": everywhere if any(everywhere) else None, "attempt": run.attempt}}
        replace_text(run.folder / NAME, json.dumps(found) + "\n")


def peak(run: Run, batches: Sequence[Batch]) -> int:
    """Most bytes that the allocator gave out in a step that is refused before it changes weights; of a CPU, 0."""
    cuda = run.world.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(run.world.device)
    with torch.random.fork_rng([run.world.device] if cuda else []):
        Stepper(run).accumulate(batches, dict.fromkeys(run.objective.terms(), 1.0))
    for engine in run.trained_engines():
        engine.step(0.0, 0.0, lambda norm: False)
    return torch.cuda.max_memory_allocated(run.world.device) if cuda else 0


def state_to_come(run: Run) -> int:
    """Bytes that the optimizers take on this rank's device from the first step on, and do not take yet."""
    return sum(engine.state_bytes() for engine in run.trained_engines()) if run.step == 0 else 0


def longest(run: Run) -> list[Batch]:
    """The first two micro-batches of a step of the longest rows, as the first replica gets them, on every rank.

    Two, so that gradients are there while the second is computed. Rows that stream are those of the first window.
    """
    split, size, objective = run.splits["train"], run.settings.batch.size, run.objective
    order = by_length(run)
    if run.settings.batch.sampler == "packed":
        filled = np.cumsum(np.asarray(split.lengths)[order])
        size = max(size, int(np.searchsorted(filled, size * run.max_length, side="right")))
    rows = np.resize(order, size)
    made = [one for row in rows for one in objective.imagined(split[int(row)], run.max_length)]
    parts = (run.plan.settings.get("objective") or {}).get("minibatches", 1)  # epochs repeat all of them
    samples = made[: -(-len(made) // parts)]
    if not objective.online():
        samples = list(objective.together(samples, run.max_length))
    first = replace(run, world=replace(run.world, replica=0))
    return step_batches(first, samples, range(len(samples)), micro_limit(run))[:2]


def imaginable(run: Run) -> bool:
    """Whether it is known what a step's samples look like before one is made."""
    return not run.objective.online() or type(run.objective).imagined is not Objective.imagined


def by_length(run: Run) -> NDArray[np.int64]:
    """Numbers of the training samples, the longest first."""
    return np.argsort(-np.asarray(run.splits["train"].lengths), kind="stable")


@contextmanager
def enough(run: Run) -> Iterator[None]:
    """Within it memory that lacks is the user's to mend."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        what = f"rank {run.world.rank} lacks memory for a step at the longest batch: {str(error).splitlines()[0]}"
        raise UserError.of(what, CURES) from None
