"""Decay towards where training began: the formula, what is kept for it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loomtune.contracts import Optimizer, ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune.testing import check_optimizer
from loomtune_plugins.optimizers.adamw import AdamW
from loomtune_plugins.optimizers.settings import AdamWSettings, SGDSettings
from loomtune_plugins.optimizers.sgd import SGD

OPTIMIZERS = {
    "adamw": AdamW(AdamWSettings(lr=1e-2, weight_decay=0.3, decay_to="start")),
    "sgd": SGD(SGDSettings(lr=1e-2, weight_decay=0.3, decay_to="start")),
    "momentum": SGD(SGDSettings(lr=1e-2, weight_decay=0.3, momentum=0.5, decay_to="start")),
}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=generator) for _ in range(steps)]


def trained(optimizer: Optimizer, steps: int = 6, *, decays: bool = True) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = parameter()
    built = optimizer.build([ParameterGroup([weight], decays, 1.0)])
    for gradient in gradients(steps):
        weight.grad = gradient.clone()
        built.step()
    return weight, built


@pytest.mark.parametrize("fused", [None, False])
def test_adamw_draws_to_the_start_beside_its_moments(fused: bool | None) -> None:
    ours, _ = trained(AdamW(AdamWSettings(lr=1e-2, weight_decay=0.3, decay_to="start", fused=fused)))
    start, mean, square = parameter().detach().double(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    weight = start.clone()
    for step, gradient in enumerate(gradients(6), 1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.double() ** 2
        ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight - 1e-2 * (ratio + 0.3 * (weight - start))
    torch.testing.assert_close(ours.detach().double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_adds_the_gradient_of_the_penalty(momentum: float) -> None:
    ours, _ = trained(SGD(SGDSettings(lr=1e-2, weight_decay=0.3, momentum=momentum, decay_to="start")))
    start = parameter().detach().double()
    weight, velocity = start.clone(), torch.zeros(3, 4).double()
    for gradient in gradients(6):
        velocity = momentum * velocity + gradient + 0.3 * (weight - start)
        weight = weight - 1e-2 * velocity
    torch.testing.assert_close(ours.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_without_gradients_weights_go_back_to_where_they_began() -> None:
    weight, built = trained(OPTIMIZERS["sgd"], 1)
    apart = (weight - parameter()).norm()
    for _ in range(3):
        weight.grad = torch.zeros(3, 4)
        built.step()
    torch.testing.assert_close((weight - parameter()).norm(), apart * (1 - 1e-2 * 0.3) ** 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_start_is_kept_as_a_tensor_like_the_parameter(name: str) -> None:
    check_optimizer(OPTIMIZERS[name])
    weight, built = trained(OPTIMIZERS[name])
    assert OPTIMIZERS[name].state()["start"] is StateKind.LIKE
    assert torch.equal(built.state[weight]["start"], parameter())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_does_not_decay_is_not_drawn_anywhere(name: str) -> None:
    free = AdamWSettings(lr=1e-2, weight_decay=0.0) if name == "adamw" else None
    momentum = 0.5 if name == "momentum" else 0.0
    plain = AdamW(free) if free else SGD(SGDSettings(lr=1e-2, momentum=momentum))
    assert torch.equal(trained(OPTIMIZERS[name], decays=False)[0], trained(plain)[0])


def test_a_parameter_that_is_first_used_later_begins_then() -> None:
    weight, other = parameter(), parameter()
    built = OPTIMIZERS["adamw"].build([ParameterGroup([weight, other], True, 1.0)])
    for step, gradient in enumerate(gradients(3)):
        weight.grad = gradient
        other.grad = gradient.clone() if step else None
        built.step()
    assert torch.equal(built.state[other]["start"], parameter()) and not torch.equal(other, weight)


def test_a_goal_that_is_none_and_a_decay_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.decay_to=base is not known"):
        AdamW(AdamWSettings(decay_to="base"))
    for made in (
        lambda: AdamW(AdamWSettings(weight_decay=0.0, decay_to="start")),
        lambda: SGD(SGDSettings(decay_to="start")),
    ):
        with pytest.raises(UserError, match=r"decay_to=start has no effect with optimizer\.weight_decay=0"):
            made()
