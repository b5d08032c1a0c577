"""What PPO credits tokens with: the score at the end, the price of leaving the reference, and what values foretold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating]


def token_rewards(score: float, ended: bool, kl: Numbers, coefficient: float, penalty: float) -> NDArray[np.float64]:
    """The reward of each token of a response, `(tokens,)`; Ziegler et al. 2019, equation 2, token by token.

    kl: `(tokens,)` estimates in nats of the KL to the reference, each paid for where it arises. The score comes with
    the last real token: the end token, or that at which the response was cut, which then costs `penalty`.
    """
    found = -coefficient * np.asarray(kl, np.float64)
    found[-1:] += score - (0.0 if ended else penalty)
    return found


def credited(
    rewards: Sequence[Numbers],
    values: Sequence[Numbers],
    *,
    gamma: float,
    lam: float,
    whitens: bool = True,
    whitens_rewards: bool = False,
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Advantages and returns of every response of a batch, `(tokens,)` each.

    rewards, values: `(tokens,)` of each response. Both whitenings are over the tokens of all responses: of rewards
    before all else and about their own mean, so that good stays good (Huang et al. 2024, "The N+ Implementation
    Details of RLHF with PPO"); of advantages at the end, so that returns are of the advantages as they were.
    """
    from loomtune.toolkit import gae

    if whitens_rewards:
        rewards = _together(rewards, shift_mean=False)
    pairs = [gae(*both, gamma, lam) for both in zip(rewards, values, strict=True)]
    advantages = [advantage for advantage, _ in pairs]
    return (_together(advantages) if whitens else advantages), [returns for _, returns in pairs]


def _together(parts: Sequence[Numbers], *, shift_mean: bool = True) -> list[NDArray[np.float64]]:
    """Whitens all parts as one."""
    from loomtune.toolkit import whiten

    if not parts:
        return []
    return np.split(whiten(np.concatenate(parts), shift_mean=shift_mean), np.cumsum([len(part) for part in parts])[:-1])


def adapted(coefficient: float, kl: float, target: float, gain: float) -> float:
    """The KL coefficient of the next batch; Ziegler et al. 2019, section 2.2.

    kl: mean over this batch's responses, in nats. A batch moves it by a share of at most `0.2 * gain`.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + gain * error)


def foretold(values: Sequence[Numbers], returns: Sequence[Numbers]) -> dict[str, float]:
    """The mean return, and which share of the returns' variance the values foretold; below 0: none, and wrong."""
    if not returns or not len(came := np.concatenate(returns)):
        return {}
    spread, missed = float(np.var(came)), float(np.var(came - np.concatenate(values)))
    return {"returns/mean": float(came.mean()), "value/explained": 1 - missed / spread if spread else 0.0}
