"""Optimizers: torch's updates, the state that is declared, and groups in order."""

import pytest
import torch
from torch import nn

from loomtune.contracts import Optimizer, ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.adamw import AdamW
from loomtune_plugins.optimizers.settings import AdamWSettings, SGDSettings
from loomtune_plugins.optimizers.sgd import SGD


def parameters(count: int = 2) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(count)]


def grouped(matrix: nn.Parameter, bias: nn.Parameter, scale: float = 1.0) -> list[ParameterGroup]:
    return [ParameterGroup([matrix], True, scale), ParameterGroup([bias], False, 1.0)]


def train(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("fused", [None, True, False])
def test_adamw_makes_the_updates_of_its_paper(fused: bool | None) -> None:
    (ours, _), (reference, _) = parameters(), parameters()
    settings = AdamWSettings(lr=1e-2, weight_decay=0.1, fused=fused)
    train(AdamW(settings).build([ParameterGroup([ours], True, 1.0)]), [ours])
    mean, square, generator = torch.zeros(3, 4), torch.zeros(3, 4), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in range(1, 6):
            gradient = torch.randn(3, 4, generator=generator)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            reference -= 1e-2 * (ratio + 0.1 * reference)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(AdamWSettings()), SGD(SGDSettings()), SGD(SGDSettings(momentum=0.9))],
    ids=["adamw", "sgd", "momentum"],
)
def test_the_state_that_is_kept_is_the_state_that_was_declared(optimizer: Optimizer) -> None:
    matrix, bias = parameters()
    built = optimizer.build(grouped(matrix, bias))
    train(built, [matrix, bias])
    kept = {name: value for name, value in built.state[matrix].items() if value is not None}
    assert set(kept) == set(optimizer.state())
    for name, kind in optimizer.state().items():
        assert kept[name].shape == (matrix.shape if kind is StateKind.LIKE else torch.Size([]))


def test_groups_stay_in_order_and_only_those_that_decay_do() -> None:
    matrix, bias = parameters()
    built = AdamW(AdamWSettings(lr=1e-3, weight_decay=0.1)).build(grouped(matrix, bias, scale=16.0))
    assert [group["params"] for group in built.param_groups] == [[matrix], [bias]]
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in built.param_groups] == [pytest.approx(16e-3), 1e-3]


def test_the_fused_kernel_is_taken_where_all_parameters_can_have_it() -> None:
    plain, other = parameters()
    assert AdamW(AdamWSettings()).build([ParameterGroup([plain], True, 1.0)]).defaults["fused"] is True
    odd = nn.Parameter(torch.zeros(2, device="meta"))
    assert not AdamW(AdamWSettings()).build([ParameterGroup([other, odd], True, 1.0)]).defaults["fused"]


def test_momentum_makes_the_textbook_velocity() -> None:
    (ours,) = parameters(1)
    start = ours.detach().clone()
    train(SGD(SGDSettings(lr=0.1, momentum=0.5)).build([ParameterGroup([ours], True, 1.0)]), [ours], steps=2)
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(3, 4, generator=generator) for _ in range(2))
    torch.testing.assert_close(ours.detach(), start - 0.1 * first - 0.1 * (0.5 * first + second))


def test_what_clips_and_the_peak_rate_come_from_the_settings() -> None:
    optimizer = AdamW(AdamWSettings(lr=3e-4, clip=0.5))
    assert (optimizer.learning_rate, optimizer.clip) == (3e-4, 0.5)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"beta1": 1.0}, {"weight_decay": float("nan")}])
def test_senseless_settings_are_refused_naming_the_key(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"optimizer.{next(iter(wrong))}"):
        AdamW(AdamWSettings(**wrong))


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.momentum"):
        SGD(SGDSettings(nesterov=True))
