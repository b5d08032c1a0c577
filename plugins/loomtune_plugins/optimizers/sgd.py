"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import ParameterGroup, StateKind
from loomtune.errors import UserError
from loomtune_plugins.optimizers.base import Checked
from loomtune_plugins.optimizers.settings import SGDSettings

if TYPE_CHECKING:
    import torch


class SGD(Checked):
    """Gradient descent with torch's momentum (no dampening): velocity = momentum * velocity + gradient.

    With `decay_to=start` the penalty is that of L2-SP, decay / 2 * |w - w0|^2 (Li et al. 2018, "Explicit Inductive Bias
    for Transfer Learning", section 3, with alpha = decay), and its gradient is added to the loss's.
    """

    def __init__(self, settings: SGDSettings) -> None:
        super().__init__(settings)
        if settings.nesterov and not settings.momentum:
            raise UserError.of(
                "optimizer.nesterov looks along a velocity that is not kept", "set optimizer.momentum=0.9"
            )

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """torch's SGD over the groups, in order."""
        import torch

        from loomtune_plugins.optimizers.start import pull_gradient

        settings = self._settings
        built = torch.optim.SGD(
            self.groups(groups),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
        )
        return self.pulled(built, pull_gradient)

    def state(self) -> Mapping[str, StateKind]:
        """The velocity, where there is one; and the start, if weights decay there."""
        velocity = {"momentum_buffer": StateKind.LIKE} if self._settings.momentum else {}
        return {**velocity, **self.starts()}
