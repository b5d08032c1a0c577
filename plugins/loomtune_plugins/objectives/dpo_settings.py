"""Settings of direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune_plugins.objectives.pairs_settings import PairsSettings


@dataclass
class DpoSettings(PairsSettings):
    """What the policy is compared with."""
