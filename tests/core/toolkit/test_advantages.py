"""Credit is what the papers and the recorded numbers say it is, and looks at nothing past a response's end."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import shared

from loomtune.toolkit import gae, kl_estimates, whiten


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared("references", "ppo.json").read_text())
    return found


@pytest.fixture(scope="module")
def credited(case: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Advantages and returns of the recorded rows, each as long as its response."""
    given = case["inputs"]
    rows = []
    for i, length in enumerate(lengths(case)):
        old, reference, values = (np.array(given[key][i][:length]) for key in ("old_logps", "ref_logps", "old_values"))
        rewards = -given["kl_coef"] * (old - reference)
        rewards[-1] += given["scores"][i] - (0 if given["has_eos"][i] else given["missing_eos_penalty"])
        rows.append(gae(rewards, values, given["gamma"], given["lam"]))
    return rows


def lengths(case: dict[str, Any]) -> list[int]:
    return [int(sum(row)) for row in case["inputs"]["mask"]]


def of_responses(case: dict[str, Any], table: list[list[float]]) -> np.ndarray:
    return np.concatenate([row[:length] for row, length in zip(table, lengths(case), strict=True)])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_of_the_kl_are_the_recorded_ones(case: dict[str, Any], estimator: str) -> None:
    old, reference = (torch.tensor(case["inputs"][key], dtype=torch.float64) for key in ("old_logps", "ref_logps"))
    found = kl_estimates(old, reference, estimator)
    assert np.allclose(
        of_responses(case, found.tolist()),
        of_responses(case, case["kl_estimators_verl"][estimator]["token"]),
        rtol=1e-6,
        atol=1e-6,
    )


def test_advantages_and_returns_are_the_recorded_ones(case: dict[str, Any], credited: Any) -> None:
    advantages, returns = (np.concatenate(parts) for parts in zip(*credited, strict=True))
    assert np.allclose(advantages, of_responses(case, case["gae"]["advantages_raw"]), atol=1e-6)
    assert np.allclose(returns, of_responses(case, case["gae"]["verl_returns"]), atol=1e-6)


@pytest.mark.parametrize(
    ("shift", "key"),
    [
        (True, "verl_advantages_whitened"),
        (True, "trl_masked_whiten_shift_true"),
        (False, "trl_masked_whiten_shift_false"),
    ],
)
def test_whitening_is_the_recorded_one(case: dict[str, Any], credited: Any, shift: bool, key: str) -> None:
    advantages = np.concatenate([each for each, _ in credited])
    assert np.allclose(whiten(advantages, shift_mean=shift), of_responses(case, case["gae"][key]), atol=1e-6)


def test_an_advantage_is_the_discounted_sum_of_the_errors_that_follow() -> None:
    draws = np.random.default_rng(0)
    rewards, values = draws.normal(size=7), draws.normal(size=7)
    gamma, lam = 0.9, 0.8
    errors = rewards + gamma * np.append(values[1:], 0) - values
    wanted = [sum((gamma * lam) ** k * errors[t + k] for k in range(7 - t)) for t in range(7)]
    advantages, returns = gae(rewards, values, gamma, lam)
    assert np.allclose(advantages, wanted, atol=1e-12)
    assert np.allclose(returns, values + wanted, atol=1e-12)


def test_with_lambda_1_a_return_is_the_discounted_sum_of_rewards_whatever_the_values() -> None:
    draws = np.random.default_rng(1)
    rewards = draws.normal(size=5)
    wanted = [sum(0.5**k * rewards[t + k] for k in range(5 - t)) for t in range(5)]
    assert np.allclose(gae(rewards, draws.normal(size=5), 0.5, 1.0)[1], wanted, atol=1e-12)


def test_nothing_is_bootstrapped_past_the_end() -> None:
    advantages, returns = gae(np.array([2.0]), np.array([0.5]), 1.0, 0.95)
    assert advantages.tolist() == [1.5] and returns.tolist() == [2.0]


def test_an_empty_response_has_no_credit() -> None:
    advantages, returns = gae(np.zeros(0), np.zeros(0))
    assert advantages.shape == returns.shape == (0,)


def test_whitened_numbers_have_bessels_variance_and_mean_0_or_their_own() -> None:
    numbers = np.random.default_rng(2).normal(3, 2, size=11)
    shifted, kept = whiten(numbers), whiten(numbers, shift_mean=False)
    assert shifted.mean() == pytest.approx(0, abs=1e-12) and kept.mean() == pytest.approx(numbers.mean())
    for found in (shifted, kept):
        assert np.sum((found - found.mean()) ** 2) / 10 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("numbers", [[], [4.0], [4.0, 4.0]])
def test_numbers_without_a_spread_stay_finite(numbers: list[float]) -> None:
    assert whiten(np.array(numbers)).tolist() == [0.0] * len(numbers)
    assert whiten(np.array(numbers), shift_mean=False).tolist() == numbers


def test_estimates_average_to_the_kl_and_k2_has_its_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    drawn = policy.exp().detach()  # an expectation over what the policy draws
    for estimator in ("k1", "k3"):
        mean = (drawn * kl_estimates(policy, reference, estimator)).sum()
        assert float(mean.detach()) == pytest.approx(float(exact.detach()))
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for estimator, found in (("k2", wanted), ("k1", torch.zeros(6, dtype=torch.float64))):
        (gradient,) = torch.autograd.grad(
            (drawn * kl_estimates(policy, reference, estimator)).sum(), logits, retain_graph=True
        )
        assert torch.allclose(gradient, found, atol=1e-12)
