"""Settings of reward models."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.objectives.pairs_settings import PROBABILITY, TextSettings


@dataclass
class RewardSettings(TextSettings):
    """How rewards are compared."""

    margin: str = option("", "the rows' column of how much better the chosen answer is; empty: nobody says")
    probability: str = option("", PROBABILITY)
    center: float = option(0.0, "how strongly the sum of both rewards is held at 0; 0.01 is usual")
