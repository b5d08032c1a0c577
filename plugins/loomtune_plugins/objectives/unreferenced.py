"""Preferences without a reference: each is a default mixture of losses, and a few settings."""

from __future__ import annotations

from collections.abc import Mapping

from loomtune.contracts import Loss, Reward
from loomtune_plugins.objectives.encoding import refuse, unknown
from loomtune_plugins.objectives.pairs import Pairwise
from loomtune_plugins.objectives.pairs_settings import OrpoSettings


class Cpo(Pairwise):
    """Xu et al. 2024, "Contrastive Preference Optimization", equation 5: preference and likelihood."""


class Simpo(Pairwise):
    """Meng et al. 2024, "SimPO": mean log-probabilities and a target margin."""


class Orpo(Pairwise):
    """Hong et al. 2024, "ORPO", equation 6: likelihood of the chosen answer, and the ratio of the answers' odds."""

    settings: OrpoSettings

    def __init__(self, settings: OrpoSettings) -> None:
        super().__init__(settings)
        refuse(unknown(settings, likelihood=("answer", "all")))

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Prompts are targets where a loss of tokens reads them."""
        super().use(losses, rewards)
        by_tokens = any(loss.by_tokens for loss in losses.values())
        self.learns_prompts = by_tokens and self.settings.likelihood == "all"

    def read(self) -> dict[str, bool]:
        """What is learned beside the preference needs a loss that learns it."""
        return super().read() | {"likelihood": any(loss.by_tokens for loss in self.losses.values())}
