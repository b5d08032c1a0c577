"""Sums and means over the entries that count."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the values where the mask is true, over all dimensions or over one; 0 where nothing counts.

    values: any shape. mask: a shape that broadcasts to it; what is not 0 counts. What the mask leaves out is never
    multiplied, so an infinity or NaN there reaches neither the sum nor the gradient.
    """
    kept = torch.where(mask.bool(), values, values.new_zeros(()))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values where the mask is true, over all dimensions or over one; 0, not NaN, where nothing counts.

    A mean over a micro-batch is a statistic to look at, never a loss: losses are sums, divided once by global totals.
    """
    counted = mask.bool().expand_as(values)
    count = counted.sum() if dim is None else counted.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)
