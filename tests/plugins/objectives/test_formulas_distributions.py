"""Distances to the reference over the whole vocabulary, beside preferences and supervised fine-tuning."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from formulas import LABELLED, PAIRS, agree, batch_of, loss_of, roles_of, rows_of
from loomtune.contracts import Batch, Objective, Role
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.testing.recorded import built
from loomtune.toolkit import log_probs
from loomtune_plugins.objectives import distill_divergence


def preference(roles: dict[str, Role], batch: Batch) -> Tensor:
    """DPO of beta 0.1."""
    rows = rows_of(roles, batch)
    return torch.stack([-F.logsigmoid(0.1 * (chosen.ratio - rejected.ratio)) for _, chosen, rejected in rows]).mean()


def distributions(role: Role, batch: Batch) -> Tensor:
    """Log-probabilities `(targets, vocabulary)` in double precision."""
    found: Tensor = role.read(batch, lambda view: view.heads["lm"](view.states))
    return found.double().log_softmax(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_distance_to_the_reference_is_a_mean_over_the_tokens_of_both_answers(direction: str, weight: float) -> None:
    def formula(roles: dict[str, Role], batch: Batch) -> Tensor:
        ours = distributions(roles["policy"], batch)
        theirs = distributions(roles["reference"], batch).detach()
        one, other = (theirs, ours) if direction == "forward" else (ours, theirs)
        return preference(roles, batch) + weight * (one.exp() * (one - other)).sum(-1).mean()

    settings = {"loss_type": ["sigmoid", "kl"], "loss_weights": [1.0, weight], "direction": direction}
    agree(built("dpo", settings), PAIRS, formula)


def held(**settings: Any) -> Objective:
    return built("dpo", {"loss_type": ["sigmoid", "kl"], "loss_weights": [1.0, 0.3], **settings})


def test_chunks_of_targets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    places = distill_divergence, sys.modules["loomtune.toolkit.log_probs"]

    def whole(roles: dict[str, Role], batch: Batch) -> Tensor:
        with monkeypatch.context() as patched:
            for place in places:
                patched.setattr(place, "CHUNK", 1000)
            return loss_of(held(), roles, batch)

    for place in places:
        monkeypatch.setattr(place, "CHUNK", 4)
    agree(held(), PAIRS, whole)


@pytest.mark.parametrize("beside", [{"use_weighting": True}, {"loss_type": ["aot", "kl"]}, {"entropy": True}])
def test_what_else_is_chosen_leaves_the_distance_as_it_is(beside: dict[str, Any]) -> None:
    """No weight of a pair, no order of a step and no look at the logits comes between."""
    plain, other = held(), held(**beside)
    roles = roles_of(plain, "policy")
    batch = batch_of(plain, PAIRS)

    def distance(objective: Objective) -> tuple[float, float]:
        with torch.no_grad():
            statistics = objective.statistics(roles, [batch], toy.world())
        sums = objective.loss(roles, batch, objective.weights(batch), statistics)
        value, weight = sums.metrics["kl"]
        return float(sums.terms["kl"].detach()), float(value / weight)

    assert distance(other) == pytest.approx(distance(plain), rel=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_supervised_fine_tuning_may_be_held_near_its_base(direction: str) -> None:
    def formula(roles: dict[str, Role], batch: Batch) -> Tensor:
        ours = distributions(roles["policy"], batch)
        theirs = distributions(roles["reference"], batch).detach()
        one, other = (theirs, ours) if direction == "forward" else (ours, theirs)
        likelihood = log_probs(roles["policy"], batch).double().mean()
        return 0.2 * (one.exp() * (one - other)).sum(-1).mean() - likelihood

    settings = {"loss_type": "kl", "loss_weights": [0.2], "direction": direction}
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in LABELLED]
    agree(built("sft", settings), rows, formula)


def test_supervised_fine_tuning_takes_no_loss_of_answers() -> None:
    with pytest.raises(UserError, match="takes losses of whole distributions, such as kl, and sigmoid is of answers"):
        built("sft", {"loss_type": ["kl", "sigmoid"]})
