"""RLOO: a completion's baseline is the mean reward of the others of its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Batch
from loomtune_plugins.objectives.encoding import refuse
from loomtune_plugins.objectives.online import credit
from loomtune_plugins.objectives.online.credit import Rewards
from loomtune_plugins.objectives.online.credited import Batched, Columns, Credited
from loomtune_plugins.objectives.online.experience import mean
from loomtune_plugins.objectives.online.rloo_settings import RlooSettings, faults
from loomtune_plugins.objectives.references import NAME

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune_plugins.objectives.online.watching import Metrics


class Rloo(Credited):
    """Ahmadian et al. 2024, "Back to Basics": a completion is one action, with one ratio and one advantage.

    The KL to the reference, k1 of the whole completion as it was drawn, is taken from its reward.
    """

    settings: RlooSettings

    def __init__(self, settings: RlooSettings) -> None:
        refuse(list(faults(settings)))
        super().__init__(settings)
        self.beta = settings.beta

    def reads_old(self) -> bool:
        """The reward's KL is of the policy that drew."""
        return self.beta != 0 or super().reads_old()

    def credit(self, batch: Batched) -> Columns:
        """Rewards, less the KL, less the mean of the others."""
        rewards = [group.rewards for group in batch.groups]
        if self.beta:
            rewards = [each - self.beta * _kl(batch, i) for i, each in enumerate(rewards)]
        return {"advantage": [each.tolist() for each in self.advantages(rewards)]}

    def advantages(self, rewards: Sequence[Rewards]) -> list[Rewards]:
        """Of what is left of the rewards `(completions,)` of each group."""
        gains = credit.left_out(rewards)
        return credit.normalized(gains) if self.settings.normalize else gains

    def idles(self, advantage: Any) -> bool:
        """What is neither better nor worse than the others has no gradient."""
        return bool(advantage == 0)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Completions."""
        return {"policy": float(batch.columns["sequences"].sum()) if "sequences" in batch.columns else 0.0}

    def learned(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """A completion's loss, shared out over its tokens."""
        from loomtune_plugins.objectives.online import surrogates

        if "advantage" not in batch.columns:  # of rows that are prompts alone
            return log_probs.sum(), log_probs, {}
        advantage, (low, high) = batch.columns["advantage"], self.settings.clip
        log_ratio = surrogates.sequence_log_ratio(log_probs - self.old(log_probs, batch), batch, mean=False)
        values, ratio = surrogates.clipped(log_ratio, advantage, low, high)
        metrics = {"ratio/mean": mean(ratio), **surrogates.clip_shares(ratio, advantage, low, high)}
        if NAME in batch.columns:
            metrics["kl"] = mean(log_probs - batch.columns[NAME])
        return (values / surrogates.lengths(batch)).sum(), ratio, metrics


def _kl(batch: Batched, group: int) -> NDArray[np.float64]:
    """`(completions,)`: k1 of each, summed over its tokens as they were drawn."""
    parts = zip(batch.columns["old"][group], batch.columns[NAME][group], strict=True)
    return np.array([float(np.sum(old - reference, dtype=np.float64)) for old, reference in parts])
