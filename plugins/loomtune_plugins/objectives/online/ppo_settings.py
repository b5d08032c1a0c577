"""Settings of PPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loomtune.errors import Fault
from loomtune.settings import option
from loomtune_plugins.objectives.encoding import unknown
from loomtune_plugins.objectives.online.settings import ESTIMATORS, OnlineSettings, sampling_faults, without_effect

VALUE = "value"
"""Of the role, of its head, and of the column that holds what it said: V(s_t), read where token t is predicted from."""

LEAST_ZERO = ("beta", "kl_target", "kl_gain", "value_clip", "value_coef", "clip_high", "missing_eos_penalty", "entropy")


@dataclass
class PpoSettings(OnlineSettings):
    """What a token is credited with, and how far one batch may move the policy and the value."""

    group: int = option(1, "completions of each prompt")
    epochs: int = option(4, "how often a batch of completions is gone through")
    value: str = option("head", "the value function: head, on the policy's network; model, a network of its own")
    value_coef: float = option(0.1, "what the value's loss counts beside the policy's")
    value_clip: float = option(0.2, "how far from what it was at the rollout a value may gain; 0: as far as it can")
    clip_low: float = option(0.2, "how far a ratio counts below 1")
    clip_high: float | None = option(None, "how far a ratio counts above 1; default clip_low")
    gamma: float = option(1.0, "what a reward one token later is worth")
    lam: float = option(0.95, "lambda of generalised advantages: 0 believes the value, 1 the rewards alone")
    beta: float = option(0.05, "what each nat of KL to the reference takes from a token's reward; 0: no reference")
    kl: str = option("k1", f"estimator of that KL: {', '.join(ESTIMATORS)}")
    kl_target: float = option(0.0, "nats of KL a completion that beta is moved towards; 0: it stays as it is")
    kl_gain: float = option(0.1, "how quickly beta moves: a batch changes it by a fifth of this share at most")
    missing_eos_penalty: float = option(0.0, "taken from the score of a completion that was cut before its end")
    whiten: bool = option(True, "advantages have mean 0 and variance 1 over all tokens of a batch of completions")
    whiten_rewards: bool = option(False, "rewards of tokens have variance 1 over these too, and keep their mean")
    entropy: float = option(0.0, "what each nat of the policy's entropy counts as a gain, beside the advantages")

    @property
    def clip(self) -> tuple[float, float]:
        """How far ratios may go below 1, and above it."""
        return self.clip_low, self.clip_low if self.clip_high is None else self.clip_high


def faults(settings: PpoSettings) -> Iterator[Fault]:
    """What is wrong with the settings, and which would have no effect."""
    yield from [*sampling_faults(settings), *unknown(settings, value=("head", "model"), kl=ESTIMATORS)]
    for key in LEAST_ZERO:
        if (value := getattr(settings, key)) is not None and value < 0:
            yield Fault(f"objective.{key}={value:g} is negative", f"set objective.{key} to 0 or more")
    for key in ("gamma", "lam", "clip_low"):
        if not 0 <= (value := getattr(settings, key)) <= 1:
            yield Fault(f"objective.{key}={value:g} does not lie between 0 and 1", f"set objective.{key} between them")
    if settings.value_coef == 0:
        what = "objective.value_coef=0 learns no values, of which advantages are made"
        yield Fault(what, "set objective.value_coef above 0, or choose objective=rloo, which needs none")
    if settings.mask_truncated:
        because = "objective.mask_truncated=true, which learns nothing of what was cut"
        yield from without_effect(settings, ("missing_eos_penalty",), because, "set objective.mask_truncated=false")
    if settings.beta == 0:
        because = "objective.beta=0, which asks for no KL"
        yield from without_effect(settings, ("kl", "kl_target", "kl_gain"), because, "set objective.beta")
    elif settings.kl_target == 0:
        yield from without_effect(settings, ("kl_gain",), "objective.kl_target=0", "set objective.kl_target")
