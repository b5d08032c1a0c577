"""Settings of the reward that a network gives."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.rewards.settings import WEIGHT


@dataclass
class ModelSettings:
    """A trained reward model: one of `roles.reward.model.path`, a network of its own, and `adapter`."""

    weight: float = option(1.0, WEIGHT)
    adapter: str = option(
        "",
        "instead of roles.reward.model.path: a run with objective=reward, or its checkpoint, of the policy's own base "
        "and adapter settings; its adapter is put in the policy's place while it is read, so no second base is held",
    )
    shift: float = option(0.0, "taken from each score: the mean of the scores of answers that are known, say")
    scale: float = option(1.0, "what the score, less `shift`, is multiplied with")
    clip: float = option(0.0, "the score then lies between -clip and clip; 0: no bound")
