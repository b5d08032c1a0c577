"""The frozen reference of preferences: what it says of answers, read in each step or once for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loomtune.contracts import Batch, Record, RoleSpec
from loomtune.contracts.objective import Roles

if TYPE_CHECKING:
    from torch import Tensor

NAME = "reference"
"""Of the role, and of the column that holds what it says."""

CHOICES = ("auto", "stored", "live")

HELP = (
    "the reference's log-probabilities: live, read in each step; stored, read once before the first step and kept "
    "on disk, so that no second network is in memory; auto: stored where there would be one, live with an adapter"
)


def roles() -> Mapping[str, RoleSpec]:
    """The policy, and what it began as: the model without its adapter, which with `adapter.path` is the bare base."""
    return {"policy": RoleSpec(trained=True), NAME: RoleSpec(trained=False, twin_of="policy")}


def records(chosen: str) -> Mapping[str, Record]:
    """What is stored of the reference. chosen: one of `CHOICES`."""
    if chosen == "live":
        return {}
    return {NAME: Record(role=NAME, read=_live, always=chosen == "stored")}


def said(roles: Roles, batch: Batch) -> Tensor:
    """Log-probability `(targets,)` of each target under the reference, without gradient."""
    return batch.columns[NAME] if NAME in batch.columns else _live(roles, batch)


def _live(roles: Roles, batch: Batch) -> Tensor:
    from loomtune.toolkit import log_probs

    return log_probs(roles[NAME], batch).detach()
