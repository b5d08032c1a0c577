"""Losses of the policy's own log-probabilities, without a reference, and the likelihood of the chosen answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loomtune.contracts import Pairs
from loomtune_plugins.losses.base import PairLoss
from loomtune_plugins.losses.margins import smoothed

if TYPE_CHECKING:
    from torch import Tensor


def means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probability a token `(pairs,)` of the chosen and of the rejected answers."""
    return pairs.chosen / pairs.chosen_tokens.clamp(min=1), pairs.rejected / pairs.rejected_tokens.clamp(min=1)


class Sft(PairLoss):
    """Negative log-likelihood of the chosen answers (and prompts, where these are learned): an anchor beside others.

    Pang et al. 2024, "Iterative Reasoning Preference Optimization", equation 1, as a mean over the tokens of the whole
    step instead of answer by answer.
    """

    name = "sft"
    by_tokens = True

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        return -pairs.chosen - pairs.prompt


class Simpo(PairLoss):
    """Meng et al. 2024, "SimPO", equation 6: means over tokens with a target margin.

    With alpha, the reward of Gupta et al. 2025, "AlphaPO", equation 8.
    """

    name = "simpo"
    by_means = True

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        chosen, rejected = (self._reward(mean) for mean in means(pairs))
        return smoothed(pairs.beta * (chosen - rejected) - self.settings.gamma, self.settings.label_smoothing)

    def _reward(self, mean: Tensor) -> Tensor:
        alpha = self.settings.alpha
        # Beyond e^80 fp32 has no numbers, and no answer is that unlikely.
        return -(-alpha * mean).clamp(max=80.0).expm1() / alpha if alpha else mean


class OddsRatio(PairLoss):
    """Hong et al. 2024, "ORPO", equations 6 and 7: beta (their lambda) times the log-sigmoid of the log odds ratio."""

    name = "odds_ratio"
    by_means = True

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        chosen, rejected = means(pairs)
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return pairs.beta * smoothed(odds, 0.0)


def _log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - p) of log p, without cancellation on either side (Maechler 2012)."""
    import torch

    below = log_p < -0.6931471805599453
    small = torch.log1p(-log_p.clamp(max=-0.6931471805599453).exp())
    # At p = 1 the odds are infinite: a hair below, the loss stays a number and its gradient finite.
    large = torch.log(-torch.expm1(log_p.clamp(min=-0.6931471805599453, max=-1e-7)))
    return torch.where(below, small, large)
