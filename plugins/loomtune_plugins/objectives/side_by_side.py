"""Two networks read at the same targets, while the weights of both heads are whole. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.contracts import Batch, Role, View
from loomtune.toolkit.log_probs import Look, target_log_probs
from loomtune_plugins.objectives.distill_divergence import Compare, compared

Read = Callable[[View, View], Any]
"""What is wanted of both: from the first's and the second's view, with one row for each target shown."""


def side_by_side(role: Role, other: Role, batch: Batch, reader: Read) -> Any:
    """What a reader makes of two roles' hidden states, with gradient in the first alone.

    The other reads within the role's reading: a sharded head has its weights together only inside its own network's
    pass. An engine cannot run within its own pass; where one engine is both, the other has read before, and its head
    is the role's with the adapter off.
    """
    if role.engine is other.engine:
        states = other.read(batch, lambda view: view.states).detach()
        return role.read(batch, lambda view: reader(view, _beneath(view, states[view.index])))

    def outer(view: View) -> Any:
        learns, made = torch.is_grad_enabled(), []

        def inner(theirs: View) -> Tensor:
            with torch.set_grad_enabled(learns):
                made.append(reader(view, theirs))
            return theirs.states.new_zeros(len(theirs.states))

        other.read(batch, inner)
        return made[0]

    return role.read(batch, outer)


def observed_beside(
    role: Role, other: Role, batch: Batch, looks: Sequence[Look], distances: Sequence[Compare]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """`observed` of a role, `(targets,)` each; the other's log-probabilities; and what each distance says of both.

    One pass over each network. The distances have a gradient, as `compared` takes it: they are to be summed.
    """

    def reader(view: View, theirs: View) -> Tensor:
        targets, head, beside = batch.target[view.index], view.heads[role.head], theirs.heads[other.head]
        seen = target_log_probs(view.states, head, targets, looks=looks).view(-1, 1 + len(looks))
        with torch.no_grad():
            reference = target_log_probs(theirs.states, beside, targets)
        apart = [compared(view.states, head, theirs.states, beside, distance, None)[0] for distance in distances]
        return torch.cat([seen, reference.unsqueeze(1), *(values.unsqueeze(1) for values in apart)], 1)

    found: Tensor = side_by_side(role, other, batch, reader)
    columns = list(found.unbind(1))
    first = 1 + len(looks)
    return columns[:first], columns[first].detach(), columns[first + 1 :]


def _beneath(view: View, states: Tensor) -> View:
    """A view of the network without its adapter."""
    return replace(view, states=states, heads={name: _Bare(head, view) for name, head in view.heads.items()})


class _Bare(nn.Module):
    """A head, called with the adapter off."""

    def __init__(self, head: nn.Module, view: View) -> None:
        super().__init__()
        self._call, self._view = (head,), view  # in a tuple, or it would be taken for a part of this module

    def forward(self, states: Tensor) -> Tensor:
        with self._view.bare():
            logits: Tensor = self._call[0](states)
        return logits
