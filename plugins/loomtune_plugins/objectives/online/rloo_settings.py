"""Settings of RLOO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loomtune.errors import Fault
from loomtune.settings import option
from loomtune_plugins.objectives.online.settings import OnlineSettings, sampling_faults


@dataclass
class RlooSettings(OnlineSettings):
    """A completion's gain over the mean of the others of its prompt."""

    group: int = option(4, "completions of each prompt")
    beta: float = option(0.05, "what the KL to the reference takes from the reward; 0: there is no reference")
    normalize: bool = option(False, "divide advantages by their std over the batch, and take their mean away")
    clip_low: float = option(0.2, "how far the ratio of a whole completion counts below 1")
    clip_high: float | None = option(None, "how far it counts above 1; default clip_low")

    @property
    def clip(self) -> tuple[float, float]:
        """How far ratios may go below 1, and above it."""
        return self.clip_low, self.clip_low if self.clip_high is None else self.clip_high


def faults(settings: RlooSettings) -> Iterator[Fault]:
    """What is wrong with the settings."""
    yield from sampling_faults(settings)
    low, high = settings.clip
    if settings.group == 1:
        yield Fault("objective.group=1 leaves no other completion out", "set objective.group to 2 or more")
    if settings.beta < 0:
        yield Fault(f"objective.beta={settings.beta:g} drives the policy away", "set objective.beta to 0 or more")
    if not 0 <= low <= 1:
        what = f"objective.clip_low={low:g} is no distance of a ratio below 1"
        yield Fault(what, "set objective.clip_low between 0 and 1")
    if settings.clip_high is not None and high < 0:
        yield Fault(f"objective.clip_high={high:g} is negative", "set objective.clip_high to 0 or more")
