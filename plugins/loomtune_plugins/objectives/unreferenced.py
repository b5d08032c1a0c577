"""Preferences without a reference: each is a default mixture of losses, and a few settings."""

from __future__ import annotations

from loomtune_plugins.objectives.encoding import refuse, unknown
from loomtune_plugins.objectives.pairs import Pairwise
from loomtune_plugins.objectives.pairs_settings import OrpoSettings


class Cpo(Pairwise):
    """Xu et al. 2024, "Contrastive Preference Optimization", equation 5: preference and likelihood."""


class Simpo(Pairwise):
    """Meng et al. 2024, "SimPO": mean log-probabilities and a target margin."""


class Orpo(Pairwise):
    """Hong et al. 2024, "ORPO", equation 6: likelihood of the chosen answer, and the ratio of the answers' odds."""

    def __init__(self, settings: OrpoSettings) -> None:
        super().__init__(settings)
        refuse(unknown(settings, likelihood=("answer", "all")))
        self.learns_prompts = settings.likelihood == "all"
