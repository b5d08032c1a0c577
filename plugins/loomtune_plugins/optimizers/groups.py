"""From the contract's parameter groups to torch's."""

from collections.abc import Sequence
from typing import Any

from loomtune.contracts import ParameterGroup
from loomtune.errors import UserError


def torch_groups(groups: Sequence[ParameterGroup], rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """One torch group for each group, in order. Norms and biases, which do not decay, get a decay of 0."""
    return [
        {
            "params": list(group.parameters),
            "lr": rate * group.learning_rate_scale,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]


def check(**least_zero: float) -> None:
    """Raises UserError naming the first setting that is negative or no number."""
    for key, value in least_zero.items():
        if not value >= 0:
            raise UserError.of(
                f"optimizer.{key}={value} is not a number from 0 on", f"set optimizer.{key} to 0 or more"
            )


def check_share(**shares: float) -> None:
    """Raises UserError naming the first setting that does not lie in [0, 1)."""
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise UserError.of(
                f"optimizer.{key}={value} does not lie between 0 and 1",
                f"set optimizer.{key} to at least 0 and below 1",
            )
