"""Checks of optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loomtune.contracts import Optimizer, ParameterGroup, StateKind

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_optimizer(optimizer: Optimizer) -> None:
    """Checks that the groups stay what they were, that steps change weights, and that the state is as declared.

    What is not declared would be missing from every checkpoint.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
    before = [parameter.detach().clone() for parameter in parameters]
    groups = [ParameterGroup([parameters[0]], True, 1.0), ParameterGroup([parameters[1]], False, 1.0)]
    built = optimizer.build(groups)
    assert [group["params"] for group in built.param_groups] == [[p] for p in parameters], "a group each, in order"
    assert optimizer.learning_rate > 0 and optimizer.clip >= 0, "a positive rate, and a clip of 0 or more"
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        built.step()
    for parameter, value in zip(parameters, before, strict=True):
        assert not torch.equal(parameter, value), "two steps changed nothing"
        _check_state(optimizer, parameter, built.state[parameter])


def _check_state(optimizer: Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    declared = optimizer.state()
    kept: dict[str, Tensor] = {name: value for name, value in state.items() if value is not None}
    assert set(kept) == set(declared), f"it keeps {sorted(kept)}, and declares {sorted(declared)}"
    for name, kind in declared.items():
        if kind is StateKind.LIKE:
            assert kept[name].shape == parameter.shape, f"{name} is declared to be of the parameter's shape"
        elif kind is StateKind.SCALAR:
            number = kept[name]
            assert not hasattr(number, "numel") or number.numel() == 1, f"{name} is declared to be one number"
