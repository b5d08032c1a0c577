"""Batches in which virtual tokens stand before each sample, and the embedding that understands them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT
from loomtune_plugins.adapters.virtual.woven import Woven, begins_at, inserted, is_first


def led(batch: Batch, length: int, vocabulary: int) -> Batch:
    """The batch with virtual tokens before every segment without a parent: ids from `vocabulary` on.

    They are that segment's first tokens, so that kernels and dropout need no word of them: all that hangs on the
    segment sees them, wherever in a row it stands. A row without samples has them too, so that every rank encodes them.
    """
    begins, count = _begins(batch), batch.tokens.shape[1]
    moved = torch.arange(count, device=begins.device) + length * begins.cumsum(1)  # (rows, count): where tokens go
    total = count + length * int(begins.sum(1).max())
    row, column = begins.nonzero(as_tuple=True)
    ahead = torch.arange(length, device=begins.device)
    there = row.unsqueeze(1) * total + moved[row, column].unsqueeze(1) - length + ahead  # (roots, length)

    def laid(old: Tensor, padding: int, new: Tensor) -> Tensor:
        flat = old.new_full((len(old), total), padding).scatter_(1, moved, old).view(-1)
        flat[there] = new
        return flat.view(-1, total)

    from_row, from_column = batch.predict_from // count, batch.predict_from % count
    return replace(
        batch,
        tokens=laid(batch.tokens, 0, vocabulary + ahead),
        positions=laid(batch.positions + length, 0, ahead),
        segments=laid(batch.segments, NO_SEGMENT, batch.segments[row, column].unsqueeze(1)),
        predict_from=from_row * total + moved[from_row, from_column],
    )


def _begins(batch: Batch) -> Tensor:
    """`(rows, length)` bool: where a segment without a parent begins, and every row."""
    segments = batch.segments
    parents = torch.cat([batch.parents, batch.parents.new_zeros(1)])  # `NO_SEGMENT` (-1) reads the last entry
    begins = (parents[segments] == NO_PARENT) & (segments != segments.roll(1, 1))
    begins[:, 0] = True
    return begins


def understand(woven: Woven) -> int:
    """Lets the model's embedding take ids behind its vocabulary for virtual tokens; gives the vocabulary's size.

    Its forward is exchanged in its place: a module around it would rename it and part what is tied to it. The encoder
    is called in there, inside all that a strategy does around the embedding's call.
    """
    embedding = woven.base.get_input_embeddings()  # type: ignore[operator]
    vocabulary = int(embedding.weight.shape[0])
    embedding.forward = partial(_embedded, woven, embedding.forward, vocabulary)
    return vocabulary


def _embedded(woven: Woven, embed: Any, vocabulary: int, ids: Tensor) -> Tensor:
    """`(rows, length, width)`. Only generation calls for rows without virtual tokens while the adapter is on."""
    virtual = ids >= vocabulary
    if not virtual.any():
        plain: Tensor = embed(ids)
        return plain
    real: Tensor = embed(ids.masked_fill(virtual, 0))
    vectors = F.embedding((ids - vocabulary).clamp_(min=0), woven.made(ids.device)[0])
    return torch.where(virtual.unsqueeze(-1), vectors.to(real.dtype), real)


def lead(vocabulary: int, woven: Woven, call: dict[str, Any]) -> dict[str, Any]:
    """A call of the whole model: the first of some rows begins with the virtual tokens, the others know of them.

    They stand behind what pads a row on the left: a sliding window counts what is masked.
    """
    at, ahead, begins = begins_at(call), torch.arange(woven.length, device=call["input_ids"].device), is_first(call)
    changed = dict(call)
    if (mask := call.get("attention_mask")) is not None:
        changed["attention_mask"] = inserted(mask, at, torch.ones_like(ahead))
    if begins:
        changed["input_ids"] = inserted(call["input_ids"], at, vocabulary + ahead)
    if (positions := call.get("position_ids")) is not None:
        moved = positions.expand(len(at), -1) + woven.length
        changed["position_ids"] = inserted(moved, at, ahead) if begins else moved
    return changed
