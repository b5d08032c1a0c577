"""Pairs of which a judge was unsure: the loss is the cross-entropy with its probability."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from formulas import PAIRS, Answer, agree, batch_of, loss_of, roles_of, rows_of
from loomtune.contracts import Batch, Role
from loomtune.errors import UserError
from loomtune.testing import check_objective
from loomtune.testing.recorded import built
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.reward import RewardModel, scores
from loomtune_plugins.objectives.reward_settings import RewardSettings

SURE = (0.8, 0.4, None)
ROWS = [{**row, **({} if sure is None else {"sure": sure})} for row, sure in zip(PAIRS, SURE, strict=True)]
P = torch.tensor([1.0 if sure is None else sure for sure in SURE], dtype=torch.float64)
"""Of a row that does not say it, the chosen answer is the better."""


def unsure(difference: Tensor, p: Tensor) -> Tensor:
    """Bai et al. 2022, section 4.1: targets of a preference model are probabilities."""
    return -(p * F.logsigmoid(difference) + (1 - p) * F.logsigmoid(-difference))


def of_pairs(
    difference: Callable[[Answer, Answer], Tensor], p: Tensor = P
) -> Callable[[dict[str, Role], Batch], Tensor]:
    def formula(roles: dict[str, Role], batch: Batch) -> Tensor:
        each = torch.stack([difference(chosen, rejected) for _, chosen, rejected in rows_of(roles, batch)])
        return unsure(each, p).mean()

    return formula


def test_dpo_learns_from_the_probability() -> None:
    agree(built("dpo", {"probability": "sure"}), ROWS, of_pairs(lambda c, r: 0.1 * (c.ratio - r.ratio)))


def test_labels_may_be_doubted_beside() -> None:
    doubted = 0.9 * P + 0.1 * (1 - P)
    objective = built("dpo", {"probability": "sure", "label_smoothing": 0.1})
    agree(objective, ROWS, of_pairs(lambda c, r: 0.1 * (c.ratio - r.ratio), doubted))


def test_so_does_a_preference_without_a_reference() -> None:
    objective = built("cpo", {"probability": "sure", "cpo_alpha": 0.0})
    agree(objective, ROWS, of_pairs(lambda c, r: 0.1 * (c.policy.sum() - r.policy.sum())))


@pytest.mark.parametrize("margin", ["", "better"])
def test_a_reward_model_learns_from_it_too(margin: str) -> None:
    objective = RewardModel(RewardSettings(probability="sure", margin=margin))
    roles = roles_of(objective, "policy")
    batch = batch_of(objective, ROWS)
    numbers = scores(roles["policy"], batch).double()
    apart = torch.tensor([row["better"] if margin else 0.0 for row in ROWS], dtype=torch.float64)
    expected = unsure(numbers[0::2] - numbers[1::2] - apart, P).mean()
    assert loss_of(objective, roles, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_a_probability_of_one_is_what_it_was_without(objective: str) -> None:
    found = []
    for settings, rows in (({}, PAIRS), ({"probability": "sure"}, [{**row, "sure": 1.0} for row in PAIRS])):
        made = built(objective, settings)
        roles = roles_of(made, "policy")
        found.append(loss_of(made, roles, batch_of(made, rows)).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_contract_is_kept() -> None:
    check_objective(RewardModel(RewardSettings(probability="sure")), ROWS)


@pytest.mark.parametrize("value", [1.2, -0.1, "0.7", True])
def test_what_is_no_probability_is_said_of_the_row(value: object) -> None:
    for objective in ("dpo", "reward"):
        with pytest.raises(ValueError, match=r"no probability for objective\.probability"):
            built(objective, {"probability": "sure"}).sample({**PAIRS[0], "sure": value}, ToyTokenizer(), 100)


def test_a_mistyped_column_is_not_taken_for_certainty() -> None:
    row = {**PAIRS[0], "probability": 0.7}
    with pytest.raises(ValueError, match=r"has no probabilty for objective\.probability, but probability"):
        built("dpo", {"probability": "probabilty"}).sample(row, ToyTokenizer(), 100)


def test_a_loss_that_would_pass_over_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective\.probability=sure has no effect with loss=\[hinge\]"):
        built("dpo", {"probability": "sure", "loss_type": "hinge"})
