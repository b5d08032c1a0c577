"""What tokens are credited with: recorded numbers, and formulas written once more."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from loomtune.toolkit import kl_estimates
from loomtune_plugins.objectives.online.ppo_credit import adapted, credited, token_rewards
from support import shared


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared("references", "ppo.json").read_text())
    return found


def rows(case: dict[str, Any], table: list[list[float]]) -> list[np.ndarray[Any, Any]]:
    """A recorded table without its padding."""
    lengths = [int(sum(row)) for row in case["inputs"]["mask"]]
    return [np.array(row[:length]) for row, length in zip(table, lengths, strict=True)]


def rewarded(case: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    given = case["inputs"]
    old, reference = (rows(case, given[key]) for key in ("old_logps", "ref_logps"))
    return [
        token_rewards(
            score,
            bool(ended),
            kl_estimates(torch.tensor(one), torch.tensor(other), "k1").numpy(),
            given["kl_coef"],
            given["missing_eos_penalty"],
        )
        for score, ended, one, other in zip(given["scores"], given["has_eos"], old, reference, strict=True)
    ]


@pytest.mark.parametrize(("whitens", "key"), [(True, "verl_advantages_whitened"), (False, "advantages_raw")])
def test_credit_is_the_recorded_one(case: dict[str, Any], whitens: bool, key: str) -> None:
    values = rows(case, case["inputs"]["old_values"])
    advantages, returns = credited(rewarded(case), values, gamma=1.0, lam=0.95, whitens=whitens)
    for found, wanted in ((advantages, case["gae"][key]), (returns, case["gae"]["verl_returns"])):
        assert np.allclose(np.concatenate(found), np.concatenate(rows(case, wanted)), atol=1e-6)


def test_the_score_comes_with_the_last_token_and_the_kl_with_its_own() -> None:
    kl = np.array([0.5, -1.0, 2.0], np.float32)
    assert token_rewards(3.0, True, kl, 0.1, 1.0).tolist() == pytest.approx([-0.05, 0.1, 2.8])
    assert token_rewards(3.0, False, kl, 0.1, 1.0).tolist() == pytest.approx([-0.05, 0.1, 1.8])
    assert token_rewards(3.0, True, kl, 0.0, 1.0).tolist() == [0, 0, 3]
    assert token_rewards(3.0, False, kl[:0], 0.1, 1.0).tolist() == []


def test_rewards_are_whitened_over_all_responses_about_their_own_mean() -> None:
    draws = np.random.default_rng(0)
    rewards, values = ([draws.normal(size=n) for n in (3, 1, 4)] for _ in range(2))
    flat = np.concatenate(rewards)
    whitened = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8) + flat.mean()
    wanted = credited(np.split(whitened, [3, 4]), values, gamma=0.9, lam=0.8, whitens=False)
    found = credited(rewards, values, gamma=0.9, lam=0.8, whitens=False, whitens_rewards=True)
    for one, other in zip(found, wanted, strict=True):
        assert np.allclose(np.concatenate(one), np.concatenate(other), atol=1e-12)


def test_a_batch_without_responses_has_no_credit() -> None:
    assert credited([], [], gamma=1.0, lam=1.0) == ([], [])


def test_the_coefficient_moves_towards_its_target_by_a_bounded_share() -> None:
    assert adapted(0.2, 6.0, 6.0, 0.1) == 0.2
    assert adapted(0.2, 6.6, 6.0, 0.1) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted(0.2, 600.0, 6.0, 0.1) == pytest.approx(0.2 * 1.02)
    assert adapted(0.2, 0.0, 6.0, 0.1) == pytest.approx(0.2 * 0.98)
