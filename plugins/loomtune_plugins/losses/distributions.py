"""Losses of whole distributions over the vocabulary, which hold the policy where it began."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import DistributionLoss
from loomtune.errors import UserError
from loomtune_plugins.losses.base import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = ("forward", "reverse")


class Kl(PairLoss, DistributionLoss):
    """KL of policy and reference at each target of both answers, a mean over them: learning without forgetting.

    Forward, KL(reference || policy), is but for a constant Li and Hoiem 2016, "Learning without Forgetting", equation
    2: it costs most where the policy gives up what the reference held likely, which is what forgetting is. Reverse,
    KL(policy || reference), is what RLHF penalises (Ouyang et al. 2022, equation 2), there on answers that the policy
    wrote. Both are exact sums over the vocabulary at given tokens, not estimates from drawn ones. TRL has neither
    beside DPO.
    """

    name = "kl"

    def check(self) -> None:
        if self.settings.direction not in DIRECTIONS:
            what = f"loss.kl.direction={self.settings.direction} is not known"
            raise UserError.of(what, f"set loss.kl.direction to {' or '.join(DIRECTIONS)}")

    def distance(self, policy: Tensor, reference: Tensor) -> Tensor:
        from loomtune.toolkit import kl

        ours, theirs = policy.log_softmax(-1), reference.log_softmax(-1)
        return kl(theirs, ours) if self.settings.direction == "forward" else kl(ours, theirs)
