"""Linear layers by oneDNN give what torch's own give, gradients included, and step aside where they must."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from loomtune_plugins.shardings import linear

WIDE, HIGH = 256, 320


@pytest.fixture(autouse=True)
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it pays: the sums are right on any that has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(linear, "pays", lambda: True)


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain, quick = nn.Linear(WIDE, HIGH, bias=bias), nn.Linear(WIDE, HIGH, bias=bias)
    quick.load_state_dict(plain.state_dict())
    linear.quicken(quick)
    return plain, quick


def is_quickened(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, WIDE), (2, 3, WIDE), (1, 1, WIDE)])
def test_outputs_and_all_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    given, results = torch.randn(shape), []
    for layer in pair(bias):
        entry = given.clone().requires_grad_()
        output = layer(entry)
        (output * torch.linspace(-1, 1, HIGH)).sum().backward()
        results.append([output.detach(), entry.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_as_wide_as_a_head_has_the_gradients_of_torch_laid_out_as_its_weights() -> None:
    torch.manual_seed(0)
    plain, quick = nn.Linear(32, 2048, bias=False), nn.Linear(32, 2048, bias=False)
    quick.load_state_dict(plain.state_dict())
    linear.quicken(quick)
    assert is_quickened(quick)
    entry = torch.randn(2, 5, 32)
    for _ in range(2):  # the second gradient is added to the first
        for layer in (plain, quick):
            (layer(entry) * torch.linspace(-1, 1, 2048)).sum().backward()
    assert quick.weight.grad is not None and quick.weight.grad.is_contiguous()
    torch.testing.assert_close(quick.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient_and_pass_it_on() -> None:
    plain, quick = pair()
    quick.requires_grad_(False)
    entry = torch.randn(4, WIDE, requires_grad=True)
    quick(entry).sum().backward()
    assert quick.weight.grad is None
    torch.testing.assert_close(entry.grad, plain.weight.sum(0).expand(4, WIDE), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_laid_out_otherwise_is_read_rightly() -> None:
    plain, quick = pair()
    turned = torch.randn(WIDE, 6).t()
    torch.testing.assert_close(quick(turned), plain(turned), rtol=1e-4, atol=1e-4)


def test_no_rows_are_no_rows() -> None:
    _, quick = pair()
    assert quick(torch.zeros(0, WIDE)).shape == (0, HIGH)


def test_autocast_is_left_to_torch() -> None:
    _, quick = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(torch.randn(2, WIDE)).dtype is torch.bfloat16


def test_a_tensor_of_another_type_is_left_to_torch() -> None:
    class Spread(torch.Tensor):
        pass

    plain, quick = pair()
    entry = torch.randn(3, WIDE).as_subclass(Spread)
    assert type(quick(entry)) is Spread, "an operation that knows plain tensors only was given another kind"
    torch.testing.assert_close(quick(entry).as_subclass(torch.Tensor), plain(entry).as_subclass(torch.Tensor))


def test_small_layers_and_other_kinds_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    module = nn.ModuleDict({"small": nn.Linear(8, 8), "own": Own(WIDE, HIGH), "large": nn.Linear(WIDE, HIGH)})
    linear.quicken(module)
    assert {name for name, part in module.items() if is_quickened(part)} == {"large"}


def test_where_it_does_not_pay_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "pays", lambda: False)
    assert not is_quickened(pair()[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_freed_after_its_pass_and_comes_back_for_the_next_is_not_kept_meanwhile(
    dtype: torch.dtype,
) -> None:
    layer, rows = nn.Linear(8, 4, dtype=dtype), torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    layer(rows).float().square().sum().backward()
    expected = [rows.grad, layer.weight.grad, layer.bias.grad]
    rows.grad = layer.weight.grad = layer.bias.grad = None

    linear.unhold(layer)
    whole, freed = layer.weight.detach().clone(), list[bool]()
    weakref.finalize(layer.weight.untyped_storage(), freed.append, True)
    output = layer(rows)
    layer.weight.data = torch.empty(0, dtype=dtype)
    assert freed, "the graph keeps the weight"
    layer.weight.data = whole
    output.float().square().sum().backward()
    close = 1e-2 if dtype is torch.bfloat16 else 1e-5
    for found, right in zip([rows.grad, layer.weight.grad, layer.bias.grad], expected, strict=True):
        assert found is not None and right is not None and torch.allclose(found, right, rtol=close)
