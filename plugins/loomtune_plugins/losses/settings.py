"""Settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option

WEIGHT = "its share where several losses are mixed"
SMOOTHING = "how likely a label is wrong, 0 to below 0.5"


@dataclass
class PairLossSettings:
    """A loss without a setting of its own."""

    weight: float = option(1.0, WEIGHT)


@dataclass
class SmoothedSettings:
    """A loss that doubts the labels."""

    weight: float = option(1.0, WEIGHT)
    label_smoothing: float = option(0.0, SMOOTHING)


@dataclass
class DoubtingSettings:
    """A loss that is made for doubtful labels."""

    weight: float = option(1.0, WEIGHT)
    label_smoothing: float = option(0.1, SMOOTHING)


@dataclass
class BcoSettings:
    """BCO's threshold between good and bad answers."""

    weight: float = option(1.0, WEIGHT)
    delta: str = option("none", "where rewards are split: none, at 0; step, at the mean of all rewards of the step")


@dataclass
class KlSettings:
    """What holds the policy where it began."""

    weight: float = option(1.0, WEIGHT)
    direction: str = option(
        "forward", "forward: KL(reference || policy), against forgetting; reverse: KL(policy || reference)"
    )


@dataclass
class DiscopopSettings:
    """DiscoPOP's blend."""

    weight: float = option(1.0, WEIGHT)
    tau: float = option(0.05, "how sharply the two losses are blended; its authors take 0.05")


@dataclass
class SimpoSettings:
    """SimPO's margin, and AlphaPO's shape of the reward."""

    weight: float = option(1.0, WEIGHT)
    gamma: float = option(0.5, "target margin between the two rewards, subtracted after beta is multiplied in")
    alpha: float = option(0.0, "AlphaPO: reward (1 - p^-alpha) / alpha of the mean probability p; 0: log p")
    label_smoothing: float = option(0.0, SMOOTHING)
