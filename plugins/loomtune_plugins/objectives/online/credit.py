"""What a completion's reward says beside those of its group. Pure, in double precision, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-4
"""Added to a standard deviation before it divides, as TRL does."""

Rewards = NDArray[np.float64]


def grouped(groups: Sequence[Rewards], divisor: str) -> list[Rewards]:
    """Rewards less the mean of their group, over a standard deviation (Shao et al. 2024, "DeepSeekMath", 4.1.2).

    groups: `(completions,)` each. divisor: `group`; `batch`, the deviation of all rewards; `none` (Liu et al. 2025,
    "Understanding R1-Zero-Like Training"). Deviations are unbiased. Equal rewards, and a single one, give zeros
    to the bit.
    """
    gains = [np.zeros_like(rewards) if _equal(rewards) else rewards - rewards.mean() for rewards in groups]
    if divisor == "none":
        return gains
    if divisor == "batch":
        over = deviation(np.concatenate([np.zeros(0), *groups])) + EPSILON
        return [gain / over for gain in gains]
    return [gain / (deviation(rewards) + EPSILON) for gain, rewards in zip(gains, groups, strict=True)]


def left_out(groups: Sequence[Rewards]) -> list[Rewards]:
    """Rewards less the mean of the others of their group (Ahmadian et al. 2024, "Back to Basics", equation 8).

    Equal rewards, and a single one, give zeros to the bit.
    """
    return [
        np.zeros_like(rewards) if _equal(rewards) else rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
        for rewards in groups
    ]


def normalized(groups: Sequence[Rewards]) -> list[Rewards]:
    """Less their mean over the batch, over their standard deviation there."""
    every = np.concatenate([np.zeros(0), *groups])
    mean, over = (every.mean() if len(every) else 0.0), deviation(every) + EPSILON
    return [(each - mean) / over for each in groups]


def deviation(values: Rewards) -> float:
    """Unbiased; 0 of equal values, to the bit, and of fewer than two."""
    return 0.0 if _equal(values) else float(values.std(ddof=1))


def _equal(values: Rewards) -> bool:
    return len(values) < 2 or bool((values == values[0]).all())
