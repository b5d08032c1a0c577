"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Optimizer, ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.groups import check, check_share, torch_groups
from loomtune_plugins.optimizers.settings import SGDSettings

if TYPE_CHECKING:
    import torch


class SGD(Optimizer):
    """Gradient descent with torch's momentum (no dampening): velocity = momentum * velocity + gradient."""

    def __init__(self, settings: SGDSettings) -> None:
        check(lr=settings.lr, weight_decay=settings.weight_decay, clip=settings.clip)
        check_share(momentum=settings.momentum)
        if settings.nesterov and not settings.momentum:
            raise UserError.of(
                "optimizer.nesterov looks along a velocity that is not kept", "set optimizer.momentum=0.9"
            )
        self._settings = settings

    @property
    def learning_rate(self) -> float:
        """The peak rate."""
        return self._settings.lr

    @property
    def clip(self) -> float:
        """Largest global gradient norm; 0 for no clipping."""
        return self._settings.clip

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """torch's SGD over the groups, in order."""
        import torch

        settings = self._settings
        return torch.optim.SGD(
            torch_groups(groups, settings.lr, settings.weight_decay),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
        )

    def state(self) -> Mapping[str, StateKind]:
        """The velocity, where there is one."""
        return {"momentum_buffer": StateKind.LIKE} if self._settings.momentum else {}
