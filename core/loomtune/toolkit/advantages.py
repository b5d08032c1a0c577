"""What a policy's tokens are credited with: pure functions of rewards, values and log-probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def kl_estimates(log_probs: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || reference) in nats from each token that the policy drew, of the arguments' shape.

    With x = log p_ref - log p: k1 = -x (unbiased, of either sign), k2 = x^2 / 2 (biased, never negative), and
    k3 = e^x - x - 1 (unbiased, never negative); Schulman, "Approximating KL Divergence", 2020. In a reward any of them
    will do. In a loss the gradient flows through both arguments that have one: that of k1 is 0 in expectation, that of
    k2 is the one of the KL, that of k3 the one of KL(reference || policy).
    """
    x = reference - log_probs
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    assert estimator == "k3", f"there is no estimator {estimator}; there are k1, k2, k3"
    return x.exp() - x - 1


def gae(
    rewards: NDArray[np.floating], values: NDArray[np.floating], gamma: float = 1.0, lam: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Advantages and returns `(length,)` of the tokens of *one* response; Schulman et al., 1506.02438, equation 16.

    rewards: `(length,)`, that of token t once it was chosen. values: `(length,)`, V(s_t) of what stands before token t.
    After the last token there is no state, so nothing is bootstrapped from what follows it, cut or not.
    returns: advantages + values, what a value function learns. They are of the advantages as they are, so whiten later.
    """
    advantages = np.zeros(len(rewards), np.float64)
    later, following = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        value = float(values[t])
        later = float(rewards[t]) + gamma * following - value + gamma * lam * later
        advantages[t], following = later, value
    return advantages, advantages + values


def whiten(values: NDArray[np.floating], *, shift_mean: bool = True) -> NDArray[np.float64]:
    """Numbers of unit variance, `(n,)` as they came: those of all tokens that count in the whole batch, no others.

    The variance has Bessel's correction (n - 1). shift_mean: makes the mean 0; otherwise it stays what it was, so that
    the sign of a reward is kept. Fewer than two numbers have no spread and are not scaled.
    """
    numbers = np.asarray(values, np.float64)
    mean = numbers.mean() if len(numbers) else 0.0
    spread = numbers.var(ddof=1) if len(numbers) > 1 else 1.0
    scaled: NDArray[np.float64] = (numbers - mean) / np.sqrt(spread + 1e-8)
    return scaled if shift_mean else scaled + mean
