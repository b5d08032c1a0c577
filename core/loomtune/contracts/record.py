"""What a frozen role says of every row, read once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loomtune.contracts.batch import Batch
from loomtune.contracts.role import Role

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A column of every sample's targets that a frozen role fills before the first step; the role is not kept for it.

    role: which. A role with records has no engine while the run trains.
    read: what the role says of a batch's targets, `(targets,)` or `(targets, width)` in fp32, without gradient; called
        with this role alone, on every rank equally often.
    width: numbers of each target; 0: one, without a dimension of its own.
    of: plain data that decides on the numbers (k, a temperature) and is nowhere else: part of what they are kept under.
    always: False where it is only wanted of a role that would need a network of its own in memory.
    """

    role: str
    read: Callable[[Mapping[str, Role], Batch], Tensor]
    width: int = 0
    of: Mapping[str, Any] = field(default_factory=dict)
    always: bool = True
