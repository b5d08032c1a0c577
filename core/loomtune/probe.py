"""Shows, before a run begins, that what shares a row does not see each other: packed samples, answers to one prompt.

Whether they do depends on the model's code, on how it attends and on the kernel; a leak would change what is learned
and say nothing (position ids alone leak wherever a cache is in use). So it is tried on the real network, not believed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loomtune.batching import collate
from loomtune.contracts import Batch, Engine, Sample, Segment
from loomtune.contracts.batch import NO_PARENT
from loomtune.errors import Fault, UserError
from loomtune.run import Run

Tokens = NDArray[np.int32]

LENGTHS = (4, 3, 5)
"""Tokens of the segments of a probe: of samples in one row, or of a prompt and two answers."""

APART = (NO_PARENT, NO_PARENT, NO_PARENT)
TREE = (NO_PARENT, 0, 0)
"""The parents of its segments."""

PACKED = Fault(
    "packing=true: the samples of a row see each other with this model and kernel",
    "set packing=false, or another kernel or model.attention",
)
SHARED = Fault(
    "batch.share: answers that share a prompt see each other, or not their prompt, with this model and kernel",
    "set batch.share=never, or another kernel or model.attention",
)

ROUNDING = 2
"""Units in the last place by which a channel may move: another segment's tokens may reorder sums, not enter them."""


def check_isolation(run: Run) -> None:
    """Raises UserError, on every rank, where changing one segment moves the hidden states of one that may not see it.

    Called on every rank in step. Dropout is off and no gradient is kept, so nothing of it is left.
    """
    layouts = {PACKED: APART} if run.settings.packing else {}
    if run.settings.batch.share != "never" and _branches(run):
        layouts[SHARED] = TREE
    leaks = dict.fromkeys(layouts, False)
    for engine in dict.fromkeys(role.engine for role in run.roles.values()):
        with engine.evaluating():
            for fault, parents in layouts.items():
                leaks[fault] |= any(list(_leaks(engine, run, parents)))  # all: every rank makes the same calls
    seen = run.world.total([float(leak) for leak in leaks.values()]) if leaks else []
    if found := [fault for fault, count in zip(leaks, seen, strict=True) if count]:
        raise UserError(*found)


def _branches(run: Run) -> bool:
    """Whether samples have several answers to a prompt; what is made while the run trains may have."""
    return run.objective.online() or run.splits["train"][0].unfolded().parts != ()


def _leaks(engine: Engine, run: Run, parents: tuple[int, ...]) -> Iterator[bool]:
    """For each segment: whether states move with its tokens that may not, or some do not that have to: its own, so that
    nothing is shown, or those of an answer to it.

    Each channel is compared with its own change and magnitude, and most of them have to speak: a few of a large model
    are thousands of times larger than the rest. What may be rounding is a share of its own change besides, of a quarter
    of the root of the precision: 2 % in bf16, 0.01 % in fp32.
    """
    eps = torch.finfo(torch.bfloat16 if run.settings.precision == "bf16" else torch.float32).eps
    row, changed = _segments(run.model.vocabulary(), 0), _segments(run.model.vocabulary(), 1)
    before, owner = _states(engine, run, row, parents)
    rounding = ROUNDING * eps * before.abs().amax(0)
    for index in range(len(row)):
        after, _ = _states(engine, run, [*row[:index], changed[index], *row[index + 1 :]], parents)
        moved, others = (after - before).abs(), torch.ones_like(owner, dtype=torch.bool)
        deaf = False
        for part in (index, *(child for child, parent in enumerate(parents) if parent == index)):
            others &= owner != part
            deaf |= not bool((moved[owner == part] > rounding).any())
        own = moved[owner == index].amax(0)
        shown = own > rounding
        still = moved[others] <= rounding + eps**0.5 / 4 * own
        yield deaf or not bool((still[:, shown].float().mean(-1) > 0.5).all())


def _segments(vocabulary: int, shift: int) -> list[Tokens]:
    """Tokens from all over the vocabulary; another shift gives others of the same lengths.

    They come from half a vocabulary away: to a model, neighbours that it seldom met are nearly the same token.
    """
    count = sum(LENGTHS)
    ids = [(2 * ((i + shift * count // 2) % count) + shift + 1) * vocabulary // (2 * count + 2) for i in range(count)]
    return np.split(np.array(ids, np.int32), np.cumsum(LENGTHS)[:-1])


def _states(engine: Engine, run: Run, row: list[Tokens], parents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Hidden states `(targets, width)` of the segments in one row, and whose each is `(targets,)`."""
    parts = [Segment(each, np.arange(len(each)) > 0, parent) for each, parent in zip(row, parents, strict=True)]
    samples = [Sample(tuple(parts))] if parents == TREE else [Sample((part,)) for part in parts]
    pad, rows = run.tokenizer.pad_id, [len(samples)]
    batch: Batch = collate(samples, range(len(samples)), pad, rows=rows).to(run.world.device)
    states: Tensor = engine.forward(batch, lambda view: view.states)
    return states.float(), batch.row
