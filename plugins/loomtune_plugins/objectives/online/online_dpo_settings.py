"""Settings of online DPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from loomtune.errors import Fault
from loomtune.settings import option
from loomtune_plugins.objectives.dpo_settings import DIVERGENCES, DpoSettings
from loomtune_plugins.objectives.online.settings import OnlineSettings, sampling_faults


@dataclass
class OnlineDpoSettings(OnlineSettings):
    """Which completions are compared is what rewards say; how, what `objective=dpo` says."""

    group: int = option(2, "completions of each prompt, of which the best is preferred to the worst")
    max_new_tokens: int = option(64, "longest completion, in tokens")
    beta: float = option(0.1, "how strongly a preference counts")
    divergence: str = option("reverse_kl", f"what keeps the policy near the reference: {', '.join(DIVERGENCES)}")
    divergence_alpha: float = option(0.5, "order of the alpha divergence; 1 is reverse_kl")
    tail: float = option(1.0, "LD-DPO: what tokens beyond the length of the shorter answer count")
    weighting: bool = option(False, "WPO: weigh pairs by how likely the policy itself gives their answers")
    margin: float = option(0.0, "a pair is learned from where its rewards differ by more than this")

    @property
    def dpo(self) -> DpoSettings:
        """What `objective=dpo` has of them. The reference is read before the steps; the entropy is always logged."""
        shared = {field.name for field in fields(DpoSettings)} & {field.name for field in fields(self)}
        return DpoSettings(reference="live", entropy=True, **{name: getattr(self, name) for name in shared})


def faults(settings: OnlineDpoSettings) -> Iterator[Fault]:
    """What is wrong with the settings, beside what `objective=dpo` finds."""
    yield from sampling_faults(settings)
    if settings.group == 1:
        yield Fault("objective.group=1 leaves nothing to prefer", "set objective.group to 2 or more")
    if settings.margin < 0:
        what = f"objective.margin={settings.margin:g} would make pairs of completions that are worth the same"
        yield Fault(what, "set objective.margin to 0 or more")
