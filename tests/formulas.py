"""What tests of objectives against formulas have in common: rows, a small network, and a comparison of gradients.

Each formula is told the log-probabilities of tokens alone, answer by answer, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loomtune.batching import collate
from loomtune.contracts import Batch, Objective, Role
from loomtune.testing import toy
from loomtune.testing.toy import ToyTokenizer
from loomtune.toolkit import log_probs

PAIRS = [
    {"prompt": "a loom ", "chosen": "weaves cloth", "rejected": "flies", "better": 0.7},
    {"prompt": "warp ", "chosen": "and weft", "rejected": "and then some more", "better": -0.2},
    {"prompt": "the ", "chosen": "weft", "rejected": "warp", "better": 1.0},
]
LABELLED = [
    {"prompt": "a loom ", "completion": "weaves cloth", "label": True},
    {"prompt": "warp ", "completion": "flies", "label": False},
    {"prompt": "the ", "completion": "weft", "label": True},
]


@dataclass(frozen=True)
class Answer:
    """Log-probabilities `(tokens,)` of one answer, in double precision; with gradient under the policy."""

    policy: Tensor
    reference: Tensor

    @property
    def ratio(self) -> Tensor:
        return (self.policy - self.reference).sum()

    @property
    def mean(self) -> Tensor:
        return self.policy.mean()


Row = tuple[Answer, ...]
"""The prompt, and what follows it: the chosen and the rejected answer of a pair."""
Formula = Callable[[list[Row]], Tensor]


def roles_of(objective: Objective, moved: str) -> dict[str, Role]:
    """A policy that is not its reference. moved: whose weights are changed, which makes answers less likely."""
    roles = toy.roles(objective)
    with torch.no_grad():
        for i, parameter in enumerate(roles[moved].engine.network.parameters()):
            parameter.mul_(1.2).add_(0.05 * (i % 3))
    return roles


def batch_of(objective: Objective, rows: list[dict[str, Any]], *, unfolded: bool = False) -> Batch:
    samples = objective.together([objective.sample(row, ToyTokenizer(), 100) for row in rows], 100)
    return collate([each.unfolded() if unfolded else each for each in samples], range(len(rows)), 0)


def rows_of(roles: dict[str, Role], batch: Batch) -> list[Row]:
    policy = log_probs(roles["policy"], batch).double()
    reference = log_probs(roles["reference"], batch).double().detach() if "reference" in roles else policy * 0.0
    cut = [Answer(policy[batch.row == i], reference[batch.row == i]) for i in range(len(batch.part))]
    width = int(batch.part.max()) + 1
    return [tuple(cut[i : i + width]) for i in range(0, len(cut), width)]


def taught(value: Tensor, role: Role) -> list[Tensor]:
    """Gradients of all parameters, which are forgotten then."""
    network = role.engine.network
    value.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
    network.zero_grad(set_to_none=True)
    return found


def loss_of(objective: Objective, roles: dict[str, Role], batch: Batch) -> Tensor:
    with torch.no_grad():
        statistics = objective.statistics(roles, [batch], toy.world())
    weights = objective.weights(batch)
    sums = objective.loss(roles, batch, weights, statistics)
    return sum((value / weights[name] for name, value in sums.terms.items()), torch.zeros(()))


def agree(
    objective: Objective,
    rows: list[dict[str, Any]],
    formula: Callable[[dict[str, Role], Batch], Tensor],
    moved: str = "policy",
) -> None:
    roles = roles_of(objective, moved)
    shared = batch_of(objective, rows)
    expected = formula(roles, shared)
    gradients = taught(expected, roles["policy"])
    size = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert size > 1e-3, "the formula teaches something"
    for batch in (shared, batch_of(objective, rows, unfolded=True)):
        found = loss_of(objective, roles, batch)
        assert found.item() == pytest.approx(expected.item(), rel=2e-6)
        apart = [one - other for one, other in zip(taught(found, roles["policy"]), gradients, strict=True)]
        assert torch.stack([difference.norm() for difference in apart]).norm() < 1e-5 * size
