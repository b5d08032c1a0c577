"""Rows cut over ranks (Ulysses: Jacobs and others, 2023, arXiv:2309.14509).

All ranks of a group hold the same batch, and each computes a stretch of its positions. Only attention looks across:
before it the ranks exchange stretches for heads, and after it heads for stretches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from loomtune.contracts.batch import NO_SEGMENT, Batch
from loomtune.contracts.model import Exchange


class Ulysses(Exchange):
    """What attention asks for, by one message to each rank of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        parts = [_split(tensor, 1, self.size) for tensor in tensors]
        flat = torch.cat([part.reshape(self.size, -1) for part in parts], 1)
        received = torch.split(self._all_to_all(flat), [part[0].numel() for part in parts], 1)
        return [_join(got.view(part.shape), 2) for got, part in zip(received, parts, strict=True)]

    def to_stretch(self, tensor: Tensor) -> Tensor:
        part = _split(tensor, 1, self.size)
        received = self._all_to_all(part.reshape(self.size, -1))
        return _join(received.view(part.shape), 2)

    def whole(self, stretch: Tensor) -> Tensor:
        return _join(self.gather(stretch.contiguous()), 1)

    def gather(self, tensor: Tensor) -> Tensor:
        """`(ranks, ...)` of a contiguous tensor that has the same shape on every rank; without gradient."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_single(gathered.view(-1), tensor.view(-1), group=self.group)
        return gathered

    def _all_to_all(self, tensor: Tensor) -> Tensor:
        received: Tensor = _AllToAll.apply(tensor, self.group)  # type: ignore[no-untyped-call]
        return received


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of a batch.

    whole: the batch with its rows padded to a multiple of the ranks. mine: this rank's stretch of every row, with the
    targets that are predicted there; its columns are the whole's. index: `(targets of mine,)`, their places among the
    targets of the whole. most: targets of the rank that has the most. place: `(targets,)`, where each target is found
    when those of all ranks lie one after the other, each rank's padded to `most`.
    """

    exchange: Ulysses
    whole: Batch
    mine: Batch
    index: Tensor
    place: Tensor
    most: int

    @classmethod
    def of(cls, batch: Batch, exchange: Ulysses) -> Share:
        """Cuts rows; where a target is predicted from decides whose it is."""
        length, ranks, rank = batch.tokens.shape[1], exchange.size, exchange.rank
        stretch = -(-length // ranks)
        row, column = batch.predict_from // length, batch.predict_from % length
        whole = _padded(batch, stretch * ranks - length, row * stretch * ranks + column)
        owner = column // stretch
        index = (owner == rank).nonzero().squeeze(1)
        here = slice(rank * stretch, (rank + 1) * stretch)
        mine = replace(
            whole,
            **{name: getattr(whole, name)[:, here].contiguous() for name in ("tokens", "positions", "segments")},
            **{name: getattr(whole, name)[index] for name in ("target", "row")},
            predict_from=(row * stretch + column % stretch)[index],
        )
        of_owner = F.one_hot(owner, ranks)
        most = int(of_owner.sum(0).max())
        before = (of_owner.cumsum(0) * of_owner).sum(1) - 1  # targets of the same owner that come before each
        return cls(exchange, whole, mine, index, owner * most + before, most)

    def join(self, made: Any, states: Tensor) -> Any:
        """What a reader made of this rank's targets, a tensor or a mapping of them, with the rows of all targets in
        their order, equal on every rank. The gradient of the whole goes back to each rank's rows.

        states: what the reader saw; a rank without targets has to take part in the backward pass through it.
        """
        if isinstance(made, Mapping):
            return {name: self._joined(tensor, states) for name, tensor in made.items()}
        return self._joined(made, states)

    def _joined(self, made: Tensor, states: Tensor) -> Tensor:
        assert isinstance(made, Tensor) and made.shape[:1] == self.index.shape, (
            f"a reader gives one row for each of the {len(self.index)} targets that it is shown, not {made!r:.80}"
        )
        if not len(made) and made.is_floating_point() and not made.requires_grad:
            made = made + states.sum().to(made.dtype)  # of nothing: 0, and a way for the gradient
        joined: Tensor = _Joined.apply(made, self)  # type: ignore[no-untyped-call]
        return joined


def _padded(batch: Batch, count: int, predict_from: Tensor) -> Batch:
    """The batch with `count` more columns of padding."""
    return replace(
        batch,
        tokens=F.pad(batch.tokens, (0, count)),
        positions=F.pad(batch.positions, (0, count)),
        segments=F.pad(batch.segments, (0, count), value=NO_SEGMENT),
        predict_from=predict_from,
    )


def _split(tensor: Tensor, dim: int, parts: int) -> Tensor:
    """`(parts, ...)`: a dimension cut into equal parts."""
    return torch.stack(torch.chunk(tensor, parts, dim))


def _join(tensor: Tensor, dim: int) -> Tensor:
    """The way back: the parts `(parts, ...)` one after the other along a dimension of what remains."""
    return tensor.movedim(0, dim).flatten(dim, dim + 1)


class _AllToAll(torch.autograd.Function):
    """The i-th row of `(ranks, n)` goes to rank i, whose row becomes the i-th here. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        back: Tensor = _AllToAll.apply(gradient.contiguous(), ctx.group)  # type: ignore[no-untyped-call]
        return back, None


class _Joined(torch.autograd.Function):
    """Rows of all ranks from the rows of each. All ranks go on alike, so each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, share: Share) -> Tensor:
        ctx.save_for_backward(share.index)
        padded = made.new_zeros((share.most, *made.shape[1:]))
        padded[: len(made)] = made
        if not share.most:
            return padded
        return share.exchange.gather(padded).flatten(0, 1)[share.place]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient[index], None
