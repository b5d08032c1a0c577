"""One answer of each sample, with what precedes it: a batch without the others. Imports torch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT


def branch(batch: Batch, part: int) -> Batch:
    """The batch with only those tokens that lie on the way to a part, moved together; without columns.

    Segments keep their numbers, so that sums by segment have the same places and dropout draws the same masks.
    """
    kept = _lineage(batch, part)
    here = (batch.segments != NO_SEGMENT) & torch.cat([kept, kept.new_zeros(1)])[batch.segments]  # padding reads -1
    rows = here.any(1)
    lengths = here.sum(1)
    count, length = max(1, int(rows.sum())), max(1, int(lengths.max()))
    row = (torch.cumsum(rows, 0) - 1).unsqueeze(1)
    place = (row * length + torch.cumsum(here, 1) - 1)[here]
    moved = batch.tokens.new_full((batch.tokens.numel(),), NO_SEGMENT)
    moved[here.flatten()] = place
    learned = kept[batch.row]
    return replace(
        batch,
        tokens=_laid(batch.tokens[here], place, count, length, 0),
        positions=_laid(batch.positions[here], place, count, length, 0),
        segments=_laid(batch.segments[here], place, count, length, NO_SEGMENT),
        predict_from=moved[batch.predict_from[learned]],
        target=batch.target[learned],
        row=batch.row[learned],
        columns={},
    )


def _lineage(batch: Batch, part: int) -> Tensor:
    """`(segments,)` bool: the part of each sample, and its ancestors."""
    kept = batch.part == part
    above = batch.parents[kept]
    while (above := above[above != NO_PARENT]).numel():
        kept[above] = True
        above = batch.parents[above]
    return kept


def _laid(values: Tensor, place: Tensor, rows: int, length: int, empty: int) -> Tensor:
    laid = values.new_full((rows * length,), empty)
    laid[place] = values
    return laid.view(rows, length)
