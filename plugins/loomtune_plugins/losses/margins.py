"""Losses of the difference between two preferences, `pairs.logits`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Pairs
from loomtune.errors import UserError
from loomtune_plugins.losses.base import PairLoss

if TYPE_CHECKING:
    from torch import Tensor


def smoothed(logits: Tensor, smoothing: float | Tensor) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): cross-entropy with labels that are wrong with probability e."""
    return -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)


def log_sigmoid(logits: Tensor) -> Tensor:
    """torch is imported when a loss is computed: the launching process makes losses too."""
    from torch.nn import functional as F

    return F.logsigmoid(logits)


class ByPreference(PairLoss):
    """One of the difference."""

    by_preference = True


class Sigmoid(ByPreference):
    """Rafailov et al. 2023, "Direct Preference Optimization", equation 7.

    Smoothed: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO), equation 3, which TRL 1.16 has no more. The
    same with a doubt of each pair's own where rows bear a probability.
    """

    name = "sigmoid"
    by_probability = True

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        wrong: float | Tensor = self.settings.label_smoothing
        if pairs.probability is not None:
            wrong = wrong + (1 - 2 * wrong) * (1 - pairs.probability)
        return smoothed(pairs.beta * pairs.logits, wrong)


class SigmoidNorm(ByPreference):
    """Lambert et al. 2024, "Tulu 3", equation 6: DPO of means over tokens instead of sums."""

    name = "sigmoid_norm"
    by_means = True

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        return -log_sigmoid(pairs.beta * _of_means(pairs))


class Hinge(ByPreference):
    """Zhao et al. 2023, "SLiC-HF", equation 1, of DPO's implicit rewards."""

    name = "hinge"

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        return (1 - pairs.beta * pairs.logits).relu()


class Ipo(ByPreference):
    """Azar et al. 2023, "A General Theoretical Paradigm", equation 17, of means over tokens, as its authors did."""

    name = "ipo"
    by_means = True

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        return (_of_means(pairs) - 1 / (2 * pairs.beta)).square()


class ExoPair(ByPreference):
    """Ji et al. 2024, "Towards Efficient Exact Optimization", equation 16 for two answers: reverse KL to the labels."""

    name = "exo_pair"

    def check(self) -> None:
        super().check()
        if not self.settings.label_smoothing:
            what = "loss.exo_pair.label_smoothing=0 takes the logarithm of 0"
            raise UserError.of(what, "set loss.exo_pair.label_smoothing to a small share, such as 0.001")

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        logits, wrong = pairs.beta * pairs.logits, self.settings.label_smoothing
        won, lost = log_sigmoid(logits), log_sigmoid(-logits)
        loss: Tensor = won.exp() * (won - math.log1p(-wrong)) + lost.exp() * (lost - math.log(wrong))
        return loss


class Robust(ByPreference):
    """Chowdhury et al. 2024, "Provably Robust DPO", equation 12: unbiased where labels are flipped at a known rate."""

    name = "robust"

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        logits, flipped = pairs.beta * pairs.logits, self.settings.label_smoothing
        right, wrong = log_sigmoid(logits), log_sigmoid(-logits)
        loss: Tensor = (flipped * wrong - (1 - flipped) * right) / (1 - 2 * flipped)
        return loss


class Discopop(ByPreference):
    """Lu et al. 2024, "Discovering Preference Optimization Algorithms", equation 5: two losses blended.

    TRL multiplies 0 with infinity where a preference is far on the wrong side; here that is the number it tends to.
    """

    name = "discopop"

    def check(self) -> None:
        if self.settings.tau <= 0:
            raise UserError.of(f"loss.discopop.tau={self.settings.tau} is no width", "set loss.discopop.tau above 0")

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        logits, width = pairs.beta * pairs.logits, self.settings.tau
        # Where the blend is 0 the exponential overflows: together they are 0, and only together a number. Beyond e^80
        # fp32 has none at all.
        exponential = (log_sigmoid(logits / width) - logits).clamp(max=80.0).exp()
        blended: Tensor = (-logits / width).sigmoid() * -log_sigmoid(logits) + exponential
        return blended


def _of_means(pairs: Pairs) -> Tensor:
    """The difference between the two preferences, each over the tokens of its answer."""
    chosen = pairs.chosen_logits / pairs.chosen_tokens.clamp(min=1)
    return chosen - pairs.rejected_logits / pairs.rejected_tokens.clamp(min=1)
