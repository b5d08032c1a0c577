"""Shows, before a run that packs begins, that the samples of a row do not see each other.

Whether they do depends on the model's code, on how it attends and on the kernel; a leak would change what is learned
and say nothing (position ids alone leak wherever a cache is in use). So it is tried on the real network, not believed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from loomtune.batching import collate
from loomtune.contracts import Batch, Engine, Sample, Segment
from loomtune.errors import UserError
from loomtune.run import Run

LENGTHS = (4, 3, 5)
"""Tokens of the samples that share the probe's row."""

ROUNDING = 2
"""Units in the last place by which a channel may move: another sample's tokens may reorder sums, not enter them."""


def check_isolation(run: Run) -> None:
    """Raises UserError, on every rank, where changing one sample of a row moves the hidden states of another.

    Called on every rank in step. Dropout is off and no gradient is kept, so nothing of it is left.
    """
    leaks = False
    for engine in dict.fromkeys(role.engine for role in run.roles.values()):
        with engine.evaluating():
            leaks |= any(list(_leaks(engine, run)))  # all of them: every rank makes the same calls
    if run.world.total([float(leaks)])[0]:
        raise UserError.of(
            "packing=true: the samples of a row see each other with this model and kernel",
            "set packing=false, or another kernel or model.attention",
        )


def _leaks(engine: Engine, run: Run) -> Iterator[bool]:
    """For each sample: whether others' states move with its tokens, or its own do not, so that nothing is shown.

    Each channel is compared with its own change and magnitude, and most of them have to speak: a few of a large model
    are thousands of times larger than the rest. What may be rounding is a share of its own change besides, of a quarter
    of the root of the precision: 2 % in bf16, 0.01 % in fp32.
    """
    eps = torch.finfo(torch.bfloat16 if run.settings.precision == "bf16" else torch.float32).eps
    row, changed = _samples(run.model.vocabulary(), 0), _samples(run.model.vocabulary(), 1)
    before, owner = _states(engine, run, row)
    rounding = ROUNDING * eps * before.abs().amax(0)
    for index in range(len(row)):
        after, _ = _states(engine, run, [*row[:index], changed[index], *row[index + 1 :]])
        moved, mine = (after - before).abs(), owner == index
        own = moved[mine].amax(0)
        shown = own > rounding
        still = moved[~mine] <= rounding + eps**0.5 / 4 * own
        yield not bool(shown.any()) or not bool((still[:, shown].float().mean(-1) > 0.5).all())


def _samples(vocabulary: int, shift: int) -> list[Sample]:
    """Samples of tokens from all over the vocabulary; another shift gives others of the same lengths.

    They come from half a vocabulary away: to a model, neighbours that it seldom met are nearly the same token.
    """
    count = sum(LENGTHS)
    ids = [(2 * ((i + shift * count // 2) % count) + shift + 1) * vocabulary // (2 * count + 2) for i in range(count)]
    cuts = np.split(np.array(ids, np.int32), np.cumsum(LENGTHS)[:-1])
    return [Sample((Segment(tokens, np.arange(len(tokens)) > 0),)) for tokens in cuts]


def _states(engine: Engine, run: Run, row: list[Sample]) -> tuple[Tensor, Tensor]:
    """Hidden states `(targets, width)` of the samples in one row, and whose each is `(targets,)`."""
    batch: Batch = collate(row, range(len(row)), run.tokenizer.pad_id, rows=[len(row)]).to(run.world.device)
    states: Tensor = engine.forward(batch, lambda view: view.states)
    return states.float(), batch.sample_of_segment[batch.row]
