"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.base import Checked
from loomtune_plugins.optimizers.groups import torch_groups
from loomtune_plugins.optimizers.settings import SGDSettings

if TYPE_CHECKING:
    import torch


class SGD(Checked):
    """Gradient descent with torch's momentum (no dampening): velocity = momentum * velocity + gradient."""

    def __init__(self, settings: SGDSettings) -> None:
        super().__init__(settings)
        if settings.nesterov and not settings.momentum:
            raise UserError.of(
                "optimizer.nesterov looks along a velocity that is not kept", "set optimizer.momentum=0.9"
            )

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
