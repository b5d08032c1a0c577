"""The norm of gradients does not depend on their size or on how they are cut."""

from __future__ import annotations

import pytest
import torch

from loomtune_plugins.shardings.norms import total_norm


def test_a_large_tensor_has_the_norm_that_float64_gives_it() -> None:
    torch.manual_seed(0)
    large = torch.randn(4_000_000) * 1e-3
    assert float(total_norm([large])) == pytest.approx(large.double().norm().item(), rel=1e-6)


def test_whole_and_cut_gradients_have_one_norm() -> None:
    torch.manual_seed(0)
    whole = torch.randn(3000, 700)
    cut = [*torch.split(whole, 1100)]
    assert float(total_norm(cut)) == pytest.approx(float(total_norm([whole])), rel=2e-7)


def test_tensors_of_all_shapes_count() -> None:
    parts = [torch.full((3, 4), 2.0), torch.tensor(1.0), torch.zeros(0), torch.ones(5).t()]
    assert float(total_norm(parts)) == pytest.approx((12 * 4 + 1 + 5) ** 0.5)


def test_no_gradients_have_a_norm_of_zero() -> None:
    assert float(total_norm([])) == 0.0
