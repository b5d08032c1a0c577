"""The norm of gradients does not depend on their size or on how they are cut."""

from __future__ import annotations

import pytest
import torch

from loomtune_plugins.shardings.norms import scale_down, total_norm


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


@pytest.mark.parametrize("most", [0.5, 3.0, 1e6])
def test_gradients_are_scaled_as_torch_scales_them(most: float) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    scale_down(gradients, most, norm)
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    assert all(torch.equal(ours, p.grad) for ours, p in zip(gradients, parameters, strict=True) if p.grad is not None)


def test_nothing_is_scaled_where_there_is_nothing() -> None:
    scale_down([], 1.0, torch.zeros(()))
