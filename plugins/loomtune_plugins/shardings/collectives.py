"""The collectives of what is cut over ranks; those of activations have their transpose as gradient.

All ranks go on alike from what is whole, so the gradient of a whole is the same on all of them. Every rank calls them
in the same order, also in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def copied(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A whole, as it is; what each rank makes of it gives a part of its gradient."""
    return _call(_Copied, tensor, group)


def summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole that ranks have summands of."""
    return _call(_Summed, tensor, group)


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole `(..., ranks * n)` that ranks have equal parts `(..., n)` of."""
    return _call(_Gathered, tensor, group)


def split(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part `(..., n)` of a whole `(..., ranks * n)`."""
    return _call(_Split, tensor, group)


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


def _call(function: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    result: Tensor = function.apply(tensor, group)
    return result


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


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _join(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _part(gradient, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _part(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _join(gradient, ctx.group), None
