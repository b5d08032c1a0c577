"""Losses that judge each answer by itself, by its log-ratio to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Pairs
from loomtune.errors import UserError
from loomtune_plugins.losses.base import PairLoss
from loomtune_plugins.losses.margins import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.world import World


def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """beta * log-ratio `(pairs,)` of the chosen and of the rejected answers."""
    chosen = pairs.beta * (pairs.chosen - pairs.reference_chosen)
    return chosen, pairs.beta * (pairs.rejected - pairs.reference_rejected)


class ByAnswer(PairLoss):
    """One that means nothing without a reference."""

    needs_reference = True


class NcaPair(ByAnswer):
    """Chen et al. 2024, "Noise Contrastive Alignment", equation 11 for two answers with labels 1 and 0."""

    name = "nca_pair"

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        chosen, rejected = rewards(pairs)
        return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


class BcoPair(ByAnswer):
    """Jung et al. 2024, "Binary Classifier Optimization", equation 9, for pairs.

    Their threshold delta is a running mean of rewards; here the step's own, or none, as in TRL's DPO.
    """

    name = "bco_pair"

    def check(self) -> None:
        if self.settings.delta not in ("none", "step"):
            what = f"loss.bco_pair.delta={self.settings.delta} is not known"
            raise UserError.of(what, "set loss.bco_pair.delta to none or step")
        self.looks_around = self.settings.delta == "step"

    def statistics(self, step: Sequence[Pairs], world: World) -> float:
        """The mean of all rewards of the step."""
        found = [reward for pairs in step for reward in rewards(pairs)]
        total, count = world.sum([sum(float(r.double().sum()) for r in found), float(sum(map(len, found)))])
        return total / max(count, 1.0)

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        chosen, rejected = (reward - (statistics or 0.0) for reward in rewards(pairs))
        return -log_sigmoid(chosen) - log_sigmoid(-rejected)


class SppoHard(ByAnswer):
    """Wu et al. 2024, "Self-Play Preference Optimization", equation 4.7 with win probabilities of 1 and 0."""

    name = "sppo_hard"

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        half = 0.5 / pairs.beta
        won, lost = pairs.chosen - pairs.reference_chosen - half, pairs.rejected - pairs.reference_rejected + half
        return won.square() + lost.square()


class ApoZero(ByAnswer):
    """D'Oosterlinck et al. 2024, "Anchored Preference Optimization", equation 7: chosen up, rejected down.

    With a constant of 1 more than the paper's, as in TRL, so that 0 is the least.
    """

    name = "apo_zero"

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        chosen, rejected = rewards(pairs)
        return (-chosen).sigmoid() + rejected.sigmoid()


class ApoDown(ByAnswer):
    """The same, equation 8: both down, the rejected one more."""

    name = "apo_down"

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        chosen, rejected = rewards(pairs)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()
