"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import ParameterGroup, StateKind
from loomtune_plugins.optimizers.base import Checked
from loomtune_plugins.optimizers.settings import AdamWSettings

if TYPE_CHECKING:
    import torch


class AdamW(Checked):
    """Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, as torch computes it.

    With `decay_to=start`, w <- w - lr * decay * (w - w0) takes the place of w <- w - lr * decay * w: the pull of L2-SP
    (Li et al. 2018, "Explicit Inductive Bias for Transfer Learning", section 3, with alpha = decay) decoupled from the
    gradient's moments, as this paper decouples L2. w0 is what a run begins with: a pretrained model, or with LoRA
    factors whose product is 0, so that the model itself is drawn to its base.
    """

    _settings: AdamWSettings

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """torch's AdamW over the groups, in order."""
        import torch

        from loomtune_plugins.optimizers.start import pull_weight

        settings = self._settings
        built = torch.optim.AdamW(
            self.groups(groups),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=_has_fused(groups) if settings.fused is None else settings.fused,
        )
        return self.pulled(built, pull_weight)

    def state(self) -> Mapping[str, StateKind]:
        """Two moments and the count of steps; and the start, if weights decay there."""
        moments = {"exp_avg": StateKind.LIKE, "exp_avg_sq": StateKind.LIKE, "step": StateKind.SCALAR}
        return {**moments, **self.starts()}


def _has_fused(groups: Sequence[ParameterGroup]) -> bool | None:
    """True where torch's fused kernel takes all parameters; None leaves the choice among the others to torch.

    The kernel takes no mixture of sharded and plain tensors, which tensor parallelism can leave in one group.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    kinds = {type(parameter.data) for parameter in parameters}
    able = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)
    return True if able and len(kinds) == 1 else None
