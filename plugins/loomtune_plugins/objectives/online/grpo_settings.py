"""Settings of GRPO and its family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loomtune.errors import Fault
from loomtune.settings import option
from loomtune_plugins.objectives.encoding import unknown
from loomtune_plugins.objectives.online.settings import ESTIMATORS, OnlineSettings, sampling_faults, without_effect

VARIANTS = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo")
"""The variants whose gain is clipped on both sides."""

SOFT = ("sapo", "vespo")
"""The variants that clip nothing: what is far off counts less and less."""

CLIPS: dict[str, tuple[float, float]] = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""How far ratios may go below 1 and above it, where that is not said; (0.2, 0.2) elsewhere."""

REDRAWS = {"dapo": 8}
"""How many batches of prompts are drawn at most for one, where that is not said; 1 elsewhere."""


@dataclass
class GrpoSettings(OnlineSettings):
    """How completions are compared within their group, and what keeps the policy near where it was."""

    variant: str = option("grpo", f"how tokens and completions are weighed and clipped: {', '.join(VARIANTS)}")
    clip_low: float | None = option(None, "how far a ratio counts below 1; default 0.2, gspo 3e-4")
    clip_high: float | None = option(
        None, "how far a ratio counts above 1; default clip_low, dapo 0.28, gspo 4e-4, cispo 4"
    )
    clip_ceiling: float | None = option(None, "largest ratio where the advantage is negative; default: none")
    level: str = option("auto", "ratios of each token, or one of the sequence: auto (as the variant), token, sequence")
    scale: str = option("auto", "what advantages are divided by: the std of the group, of the batch, none; auto")
    beta: float = option(0.0, "how strongly the KL to the reference counts; 0: there is no reference")
    kl: str = option("k3", f"estimator of the KL: {', '.join(ESTIMATORS)}")
    kl_correction: bool = option(True, "weigh the KL by the importance ratio, so that its gradient is unbiased")
    dynamic: int | None = option(
        None, "batches of prompts drawn at most for one, while groups have equal rewards; default 1, dapo 8"
    )
    sapo_temperature_pos: float = option(1.0, "sapo: how fast a gain fades as the ratio leaves 1")
    sapo_temperature_neg: float = option(1.05, "sapo: the same where the advantage is negative")
    vespo_k_pos: float = option(2.0, "vespo: power of the sequence's ratio w in w^k exp(lambda (1 - w))")
    vespo_lambda_pos: float = option(3.0, "vespo: lambda")
    vespo_k_neg: float = option(3.0, "vespo: the same where the advantage is negative")
    vespo_lambda_neg: float = option(2.0, "vespo: the same where the advantage is negative")

    @property
    def clip(self) -> tuple[float, float]:
        """How far ratios may go below 1, and above it."""
        low, high = CLIPS.get(self.variant, (0.2, 0.2))
        if self.clip_low is not None and self.variant not in CLIPS:
            high = self.clip_low
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def by_sequence(self) -> bool:
        """Whether a completion has one ratio for all its tokens."""
        return self.level == "sequence" or (self.level == "auto" and self.variant == "gspo")

    @property
    def divisor(self) -> str:
        """What advantages are divided by."""
        return self.scale if self.scale != "auto" else "none" if self.variant == "dr_grpo" else "group"

    @property
    def draws(self) -> int:
        """How many batches of prompts are drawn at most for one."""
        return REDRAWS.get(self.variant, 1) if self.dynamic is None else self.dynamic


def faults(settings: GrpoSettings) -> Iterator[Fault]:
    """What is wrong with the settings, and which would have no effect."""
    wrong = unknown(
        settings, variant=VARIANTS, level=("auto", "token", "sequence"), scale=("auto", "group", "batch", "none")
    )
    yield from [*sampling_faults(settings), *wrong, *unknown(settings, kl=ESTIMATORS)]
    if settings.group == 1:
        yield Fault("objective.group=1 leaves nothing to compare a completion with", "set objective.group to 2 or more")
    if settings.beta < 0:
        yield Fault(f"objective.beta={settings.beta:g} drives the policy away", "set objective.beta to 0 or more")
    if settings.draws < 1:
        yield Fault(f"objective.dynamic={settings.dynamic} draws no prompts", "set objective.dynamic to at least 1")
    if not wrong:
        yield from _clips(settings)
        yield from _unused(settings)


def _clips(settings: GrpoSettings) -> Iterator[Fault]:
    low, high = settings.clip
    if settings.variant in CLIPPED and not 0 <= low <= 1:
        what = f"objective.clip_low={low:g} is no distance of a ratio below 1"
        yield Fault(what, "set objective.clip_low between 0 and 1")
    if settings.clip_high is not None and high < 0:
        yield Fault(f"objective.clip_high={high:g} is negative", "set objective.clip_high to 0 or more")
    if settings.clip_ceiling is not None and settings.clip_ceiling < 1 + high:
        what = f"objective.clip_ceiling={settings.clip_ceiling:g} is within what objective.clip_high={high:g} lets pass"
        yield Fault(what, f"set objective.clip_ceiling above {1 + high:g}, or leave it out")


def _unused(settings: GrpoSettings) -> Iterator[Fault]:
    variant = f"objective.variant={settings.variant}"
    if settings.beta == 0:
        yield from without_effect(
            settings, ("kl", "kl_correction"), "objective.beta=0, which asks for no KL", "set objective.beta"
        )
    elif settings.kl == "k1" and not settings.kl_correction:
        what = "objective.kl=k1 with objective.kl_correction=false has a gradient that is 0 in the mean"
        yield Fault(what, "set objective.kl_correction=true, or objective.kl=k2")
    if settings.variant not in CLIPPED:
        keys = ("clip_ceiling", "level", *(("clip_low",) if settings.variant == "cispo" else ("clip_low", "clip_high")))
        yield from without_effect(settings, keys, variant, f"choose among {', '.join(CLIPPED)}")
    elif settings.variant == "gspo" and settings.level == "token":
        what = "objective.level=token is what objective.variant=gspo is not"
        yield Fault(what, "leave it out, or set objective.variant=grpo")
    for name in ("sapo", "vespo"):
        if settings.variant != name:
            keys = tuple(key for key in vars(settings) if key.startswith(f"{name}_"))
            yield from without_effect(settings, keys, variant, f"set objective.variant={name}")
    for key in ("sapo_temperature_pos", "sapo_temperature_neg"):
        if (value := getattr(settings, key)) <= 0:
            yield Fault(f"objective.{key}={value:g} is not above 0", f"set objective.{key} above 0")
