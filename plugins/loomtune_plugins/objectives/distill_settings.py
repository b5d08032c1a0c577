"""Settings of learning from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.objectives.sft_settings import SftSettings


@dataclass
class DistillSettings(SftSettings):
    """How far the policy is from its teacher, and on which tokens."""

    beta: float = option(0.5, "0: forward KL(teacher || policy), 1: reverse KL(policy || teacher), between: JSD")
    temperature: float = option(1.0, "divides the logits of both")
