"""How much a rank computes at once, where `batch.micro=auto`: memory and time only, never the maths."""

from __future__ import annotations

import torch

from loomtune.batching import CPU_TOKENS, collate
from loomtune.dry import by_length, enough, imaginable, peak, state_to_come
from loomtune.run import Run

MARGIN = 0.85
"""Share of the device's memory that is planned with: allocators fragment, and libraries take some."""


def token_budget(run: Run) -> int:
    """Tokens of a micro-batch, padding included, equal on every rank.

    On a CPU, and where nobody knows what a step holds, a constant that suits a core's cache. On an accelerator one and
    then two of the longest rows are run forward and backward, without a trace, and what a token costs is read from the
    allocator; nothing is run until it breaks.
    """
    if run.world.device.type == "cpu" or not isinstance(run.settings.batch.micro, str) or not imaginable(run):
        return CPU_TOKENS
    rows = _longest(run)
    with enough(run):
        peaks = [_peak(run, rows[: count + 1]) for count in range(len(rows))]
    length = sum(int(run.splits["train"].lengths[number]) for number in rows[0])
    _, total = torch.cuda.mem_get_info(run.world.device)
    mine = affordable(peaks, length, int(total * MARGIN) - state_to_come(run))
    return int(min(run.world.gather(mine)))


def _longest(run: Run) -> list[tuple[int, ...]]:
    """The two longest rows, each as numbers of training samples.

    Where the run packs, each holds two samples, so that the mask that keeps them apart is measured too.
    """
    order = [int(number) for number in by_length(run)[:4]]
    each = 2 if run.settings.packing and len(order) == 4 else 1
    return [tuple(order[start : start + each]) for start in range(0, len(order), each)][:2]


def affordable(peaks: list[int], length: int, capacity: int) -> int:
    """Tokens that fit into `capacity` bytes, where one row of `length` tokens peaks at `peaks[0]` bytes and two at
    `peaks[1]`: memory grows evenly with tokens. At least one row."""
    a_row = max(1, peaks[-1] - peaks[0])
    return length * max(1, 1 + (capacity - peaks[0]) // a_row)


def _peak(run: Run, rows: list[tuple[int, ...]]) -> int:
    """Most bytes that the allocator gave out while these rows of training samples went forward and backward."""
    objective, split = run.objective, run.splits["train"]
    samples = [objective.imagined(split[number], run.max_length)[0] for row in rows for number in row]
    batch = collate(samples, range(len(samples)), run.tokenizer.pad_id, rows=[len(row) for row in rows])
    return peak(run, [batch.to(run.world.device)])
