"""Sums and means over the entries that count."""

from __future__ import annotations

import torch

from loomtune.toolkit.sums import masked_mean, masked_sum

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
MASK = torch.tensor([[True, False, True], [False, False, False]])


def test_only_what_the_mask_keeps_is_summed() -> None:
    assert masked_sum(VALUES, MASK) == 5
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [5, 0]
    assert masked_sum(VALUES, MASK.long()) == 5
    assert masked_sum(VALUES, MASK[:1]) == 45  # a mask of one row broadcasts


def test_a_mean_divides_by_what_is_kept_and_is_zero_where_nothing_is() -> None:
    assert masked_mean(VALUES, MASK) == 2.5
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [2.5, 0]
    assert masked_mean(VALUES, MASK[:1]) == 45 / 4
    assert masked_mean(VALUES, MASK & False) == 0
    assert masked_mean(torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000)) == 1


def test_nan_outside_the_mask_reaches_neither_sum_nor_gradient() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total = masked_mean(values, torch.tensor([True, False, False]))
    total.backward()
    assert total.item() == 1
    assert values.grad is not None and values.grad.tolist() == [1, 0, 0]
