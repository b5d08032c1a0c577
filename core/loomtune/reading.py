"""What networks say of samples' targets, without gradient, computed by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loomtune.batching import micro_limit, step_batches
from loomtune.contracts import Batch, Sample

if TYPE_CHECKING:
    from loomtune.run import Run

DEVICE_TOKENS = 8192
"""Tokens of a micro-batch on an accelerator where `batch.micro=auto`: a pass that keeps no gradient needs little."""


def read(
    run: Run,
    samples: Sequence[Sample],
    reader: Callable[[Batch], Tensor],
    numbers: range | None = None,
    *,
    packs: bool = True,
    leaving: str = "asked to leave between two steps; what was begun for the next one is begun anew",
) -> list[NDArray[np.float32]]:
    """`(targets, ...)` for each sample, segment by segment, the same on every rank.

    numbers: of the samples; None: from 0. leaving: what is said to who is asked to leave meanwhile.
    """
    numbers = numbers or range(len(samples))
    if not samples:
        return []
    limit = micro_limit(run)
    if not packs:
        limit = replace(limit, packed=0)
    if run.world.device.type != "cpu" and limit.tokens:
        limit = replace(limit, tokens=max(limit.tokens, DEVICE_TOKENS))
    places, values = [], []
    with ExitStack() as still:
        still.enter_context(torch.no_grad())
        for engine in dict.fromkeys(role.engine for role in run.roles.values()):
            still.enter_context(engine.evaluating())  # a trained role would be read with dropout
        for batch in step_batches(run, samples, numbers, limit):
            run.heed(leaving)  # every rank has equally many of these batches
            values.append(reader(batch).float())
            owner = batch.sample_numbers[batch.sample_of_segment[batch.row]]
            places.append(torch.stack([owner, batch.part[batch.row]], 1))
    owner, part = run.world.gather_tensor(torch.cat(places)).cpu().numpy().T
    found = run.world.gather_tensor(torch.cat(values)).cpu().numpy()
    # Targets of a segment are together and in order, wherever they were computed; sorting keeps equal ones so.
    ends = np.cumsum(np.bincount(owner - numbers.start, minlength=len(samples)))
    return np.split(found[np.lexsort((part, owner))], ends[:-1])
