"""Objectives that learn from answers against the formulas of their papers, in double precision, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from formulas import LABELLED, PAIRS, Answer, Formula, Row, agree, batch_of, roles_of, rows_of
from loomtune.contracts import Batch, Role
from loomtune.testing.recorded import built
from loomtune_plugins.objectives.reward import scores


def pairs(of: Callable[[Answer, Answer], Tensor]) -> Formula:
    """A mean over pairs."""
    return lambda rows: torch.stack([of(chosen, rejected) for _, chosen, rejected in rows]).mean()


def likelihood(rows: list[Row], *, prompts: bool = False) -> Tensor:
    """The negative mean over the tokens of all chosen answers."""
    return -torch.cat([part.policy for row in rows for part in (row[:2] if prompts else row[1:2])]).mean()


def dpo(divergence: Callable[[Tensor], Tensor], beta: float = 0.1) -> Formula:
    """Wang 2023, equation 7, with t = policy / reference of a whole answer."""
    return pairs(lambda c, r: -F.logsigmoid(beta * (divergence(c.ratio.exp()) - divergence(r.ratio.exp()))))


def desensitised(alpha: float, beta: float = 0.1) -> Formula:
    """Liu 2024, equation 7: beyond the shorter answer's length, probabilities to the power of alpha."""

    def ratio(answer: Answer, shorter: int) -> Tensor:
        apart = answer.policy - answer.reference
        return apart[:shorter].sum() + alpha * apart[shorter:].sum()

    def of(c: Answer, r: Answer) -> Tensor:
        shorter = min(len(c.policy), len(r.policy))
        return -F.logsigmoid(beta * (ratio(c, shorter) - ratio(r, shorter)))

    return pairs(of)


def odds(c: Answer, r: Answer) -> Tensor:
    """Hong 2024, equations 4 to 7: the log-sigmoid of the ratio of the odds of p, the mean likelihood a token."""
    ratio = (c.mean.exp() / (1 - c.mean.exp())) / (r.mean.exp() / (1 - r.mean.exp()))
    return -torch.log(1 / (1 + 1 / ratio))


def alpha_margin(alpha: float) -> Callable[[Answer, Answer], Tensor]:
    """Gupta 2025: the difference of (1 - p^-alpha) / alpha."""
    return lambda c, r: ((1 - c.mean.exp() ** -alpha) - (1 - r.mean.exp() ** -alpha)) / alpha


VARIANTS: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "DPO": ("dpo", {}, dpo(torch.log)),
    "DPO of beta 0.5, labels doubted": (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.1},
        pairs(
            lambda c, r: -0.9 * F.logsigmoid(0.5 * (c.ratio - r.ratio)) - 0.1 * F.logsigmoid(0.5 * (r.ratio - c.ratio))
        ),
    ),
    "forward KL": ("dpo", {"f_divergence_type": "forward_kl"}, dpo(lambda t: -1 / t)),
    "Jensen-Shannon": ("dpo", {"f_divergence_type": "js_divergence"}, dpo(lambda t: torch.log(2 * t / (1 + t)))),
    **{
        f"alpha divergence of order {order}, the paper's {1 - order:g}": (
            "dpo",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": order},
            # Table 2 of the paper, whose alpha is 1 - order.
            dpo(lambda t, alpha=1 - order: (1 - t**-alpha) / alpha),
        )
        for order in (0.3, 0.7, 1.4)
    },
    "alpha divergence of order 1": (
        "dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        dpo(torch.log),
    ),
    "IPO of a divergence": (
        "dpo",
        {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
        pairs(
            lambda c, r: (
                (
                    torch.log(2 / (1 + torch.exp(-c.ratio))) / len(c.policy)
                    - torch.log(2 / (1 + torch.exp(-r.ratio))) / len(r.policy)
                    - 5
                )
                ** 2
            )
        ),
    ),
    "LD-DPO": ("dpo", {"ld_alpha": 0.3}, desensitised(0.3)),
    "LD-DPO beside the likelihood of whole answers": (
        "dpo",
        {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        lambda rows: desensitised(0.3)(rows) + 0.5 * likelihood(rows),
    ),
    "LD-DPO without tails": ("dpo", {"ld_alpha": 0.0}, desensitised(0.0)),
    "a mixture": (
        "dpo",
        {"loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [0.7, 0.4, 0.2]},
        lambda rows: (
            0.7 * dpo(torch.log)(rows)
            + 0.4 * pairs(lambda c, r: F.relu(1 - 0.1 * (c.ratio - r.ratio)))(rows)
            + 0.2 * likelihood(rows)
        ),
    ),
    "CPO": (
        "cpo",
        {"cpo_alpha": 0.3},
        lambda rows: (
            pairs(lambda c, r: -F.logsigmoid(0.1 * (c.policy.sum() - r.policy.sum())))(rows) + 0.3 * likelihood(rows)
        ),
    ),
    "CPO, hinge": (
        "cpo",
        {"loss_type": "hinge"},
        lambda rows: pairs(lambda c, r: F.relu(1 - 0.1 * (c.policy.sum() - r.policy.sum())))(rows) + likelihood(rows),
    ),
    "SimPO": (
        "simpo",
        {"beta": 2.5, "simpo_gamma": 1.4},
        pairs(lambda c, r: -F.logsigmoid(2.5 * (c.mean - r.mean) - 1.4)),
    ),
    "CPO-SimPO with AlphaPO's reward": (
        "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3, "alpha": 0.25, "cpo_alpha": 0.5},
        lambda rows: (
            pairs(lambda c, r: -F.logsigmoid(2.0 * alpha_margin(0.25)(c, r) - 0.3))(rows) + 0.5 * likelihood(rows)
        ),
    ),
    "ORPO of beta 1": ("orpo", {"beta": 1.0}, lambda rows: likelihood(rows, prompts=True) + pairs(odds)(rows)),
    "ORPO of answers alone": (
        "orpo",
        {"beta": 0.3, "likelihood": "answer"},
        lambda rows: likelihood(rows) + 0.3 * pairs(odds)(rows),
    ),
}
"""Objective, settings by TRL's names or ours, and what its paper makes of the rows."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_give_the_loss_and_gradients_of_the_paper(variant: str) -> None:
    name, settings, formula = VARIANTS[variant]
    agree(built(name, settings), PAIRS, lambda roles, batch: formula(rows_of(roles, batch)))


def test_tokens_that_count_less_in_the_preference_are_logged_whole() -> None:
    found = {}
    for alpha in (1.0, 0.3):
        objective = built("dpo", {"ld_alpha": alpha})
        batch, roles = batch_of(objective, PAIRS), roles_of(objective, "policy")
        metrics = objective.loss(roles, batch, objective.weights(batch), {}).metrics
        found[alpha] = {name: float(value) for name, (value, _) in metrics.items()}
    assert found[0.3]["logps/chosen"] == found[1.0]["logps/chosen"]
    assert found[0.3]["logps/rejected"] == found[1.0]["logps/rejected"]
    assert found[0.3]["rewards/rejected"] != found[1.0]["rewards/rejected"]


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_far_from_the_reference_is_a_number(divergence: str) -> None:
    objective = built("dpo", {"divergence": divergence})
    ratios = torch.tensor([-400.0, -50.0, 0.0, 50.0, 400.0], requires_grad=True)
    found = objective.preference(ratios)
    found.sum().backward()
    assert found.isfinite().all() and ratios.grad.isfinite().all()
    assert (found.diff() >= 0).all(), "the likelier, the more preferred"
    exact = {
        "forward_kl": 1 - math.exp(50),
        "js_divergence": math.log(2) - 50,
        "alpha_divergence": 2 - 2 * math.exp(25),
    }
    assert found[1].item() == pytest.approx(exact[divergence], rel=1e-5)


@pytest.mark.parametrize("moved", ["policy", "reference"])
@pytest.mark.parametrize("variant", ["kto", "apo_zero_unpaired"])
def test_single_answers_give_the_loss_and_gradients_of_the_paper(variant: str, moved: str) -> None:
    """Ethayarajh 2024, equation 8 with lambda 1.3 and 0.4: lambda - v; APO's has no z0."""

    def formula(roles: dict[str, Role], batch: Batch) -> Tensor:
        rows = rows_of(roles, batch)
        z0 = 0.0
        if variant == "kto":
            mean = sum(row[2].ratio.item() for row in rows) / len(rows)
            assert (mean > 0) == (moved == "reference")
            z0 = max(0.0, mean)
        values = [
            1.3 - 1.3 * torch.sigmoid(0.2 * (row[1].ratio - z0))
            if given["label"]
            else 0.4 - 0.4 * torch.sigmoid(0.2 * (z0 - row[1].ratio))
            for row, given in zip(rows, LABELLED, strict=True)
        ]
        return torch.stack(values).mean()

    settings = {"loss_type": variant, "beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.4}
    agree(built("kto", settings), LABELLED, formula, moved)


@pytest.mark.parametrize("center", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("margin", ["", "better"])
def test_rewards_give_the_loss_and_gradients_of_the_paper(center: float, margin: str) -> None:
    """Ouyang 2022, equation 1, with Touvron 2023's margin (equation 2) and Eisenstein 2023's centring."""

    def formula(roles: dict[str, Role], batch: Batch) -> Tensor:
        rewards = scores(roles["policy"], batch).double().view(-1, 2)
        values = [
            -torch.log(1 / (1 + torch.exp(-(c - r - (given["better"] if margin else 0.0))))) + center * (c + r) ** 2
            for (c, r), given in zip(rewards, PAIRS, strict=True)
        ]
        return torch.stack(values).mean()

    agree(built("reward", {"center": center, "margin": margin}), PAIRS, formula)
