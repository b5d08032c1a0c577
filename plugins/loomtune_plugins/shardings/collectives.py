"""The collectives of what is cut over ranks; those of activations have their transpose as gradient.

All ranks go on alike from what is whole, so the gradient of a whole is the same on all of them. Every rank calls them
in the same order, also in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


def copied(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A whole, as it is; what each rank makes of it gives a part of its gradient."""
    return _with_transpose(_same, _sum, tensor, group)


def summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole that ranks have summands of."""
    return _with_transpose(_sum, _same, tensor, group)


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole `(..., ranks * n)` that ranks have equal parts `(..., n)` of."""
    return _with_transpose(_join, _part, tensor, group)


def split(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part `(..., n)` of a whole `(..., ranks * n)`."""
    return _with_transpose(_part, _join, tensor, group)


def joined(part: Tensor, dim: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """The whole, of `size` along a dimension, that ranks have the chunks of that `torch.chunk` makes; no gradient."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return part
    most = -(-size // ranks)
    shape = list(part.shape)
    shape[dim] = most
    padded = part.new_empty(shape)
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    parts = part.new_empty((ranks, *shape))
    dist.all_gather_single(parts.view(-1), padded.view(-1), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, size)


def _with_transpose(forward: Collective, backward: Collective, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    result: Tensor = _Transposed.apply(tensor, forward, backward, group)  # type: ignore[no-untyped-call]
    return result


class _Transposed(torch.autograd.Function):
    """One collective forward, another backward."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, forward: Collective, backward: Collective, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.backward_by, ctx.group = backward, group
        return forward(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backward_by(gradient, ctx.group), None, None, None


def _same(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return tensor.view_as(tensor)


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _join(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    parts = tensor.new_empty((size, *tensor.shape))
    dist.all_gather_single(parts.view(-1), tensor.contiguous().view(-1), group=group)
    return parts.movedim(0, -2).flatten(-2)


def _part(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return tensor.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].contiguous()
