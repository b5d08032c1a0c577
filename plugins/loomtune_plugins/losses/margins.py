"""Losses of the difference between two preferences, `pairs.logits`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from loomtune.contracts import Loss, Pairs
from loomtune_plugins.losses.settings import PairLossSettings


class PairLoss(Loss):
    """One whose settings say its weight."""

    def __init__(self, settings: PairLossSettings) -> None:
        self.settings = settings
        self.weight = settings.weight


class Sigmoid(PairLoss):
    """Rafailov et al. 2023, equation 7: -log sigmoid(beta * logits)."""

    def of(self, pairs: Pairs, statistics: Any) -> Tensor:
        return -F.logsigmoid(pairs.beta * pairs.logits)
