"""Settings of direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.pairs_settings import PairsSettings

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class DpoSettings(PairsSettings):
    """What the policy is compared with, and how."""

    divergence: str = option("reverse_kl", f"what keeps the policy near the reference: {', '.join(DIVERGENCES)}")
    divergence_alpha: float = option(0.5, "order of the alpha divergence; 1 is reverse_kl")
    reference: str = option("auto", references.HELP)
    tail: float = option(1.0, "LD-DPO: what tokens beyond the length of the shorter answer count")
    weighting: bool = option(False, "WPO: weigh pairs by how likely the policy itself gives their answers")
