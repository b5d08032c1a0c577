"""Weight decay towards where training began. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

START = "start"
"""The name of the first weights in the state that an optimizer keeps for each parameter."""

DECAY = "decay_to_start"
"""The option of a parameter group."""

Pull = Callable[[nn.Parameter, Tensor, float, float], None]
"""Draws a parameter towards its start, by learning rate and decay."""


def pull_weight(parameter: nn.Parameter, start: Tensor, rate: float, decay: float) -> None:
    """w <- w - rate * decay * (w - start), beside the gradient's step."""
    parameter.sub_((parameter - start).mul_(rate * decay))


def pull_gradient(parameter: nn.Parameter, start: Tensor, rate: float, decay: float) -> None:
    """g <- g + decay * (w - start), the gradient of decay / 2 * |w - start|^2."""
    assert parameter.grad is not None
    parameter.grad.add_(parameter - start, alpha=decay)


def keep_start(optimizer: torch.optim.Optimizer, pull: Pull) -> None:
    """Makes an optimizer keep each parameter's value before its first step, and pull it there in every later one.

    Parameters are looked up at each step, because ZeRO puts flat parts of many in their place. In the first step there
    is nothing to pull yet; what it began from joins the state only after it, since torch takes a state that is not
    empty for a complete one.
    """
    fresh: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                start = optimizer.state.get(parameter, {}).get(START)
                if parameter.grad is None:
                    continue
                if start is None:
                    fresh[parameter] = parameter.detach().clone()
                elif group[DECAY]:
                    pull(parameter, start, group["lr"], group[DECAY])

    def after(*_: Any) -> None:
        for parameter, start in fresh.items():
            optimizer.state[parameter][START] = start
        fresh.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
