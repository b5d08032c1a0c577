"""What the policy and the value say of targets: in one pass where they are one network. Imports torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from loomtune.contracts import Batch, Role, View
from loomtune.contracts.objective import Roles
from loomtune.toolkit import entropy
from loomtune.toolkit.log_probs import target_log_probs
from loomtune_plugins.objectives.distill_divergence import compared
from loomtune_plugins.objectives.online.ppo_settings import VALUE
from loomtune_plugins.scalar_scores import scores


class Said(NamedTuple):
    """Of each target, `(targets,)` fp32: log-probability, entropy without gradient, value, and entropy with gradient.

    The last, which costs another pass over the logits, are zeros where it is not wanted; it is to be summed.
    """

    log_probs: Tensor
    entropies: Tensor
    values: Tensor
    bonus: Tensor


def said(roles: Roles, batch: Batch, temperature: float, *, bonus: bool = False) -> Said:
    """Reads both roles, with gradient where there is one."""
    policy, value = roles["policy"], roles[VALUE]
    together = policy.engine is value.engine

    def reader(view: View) -> Tensor:
        columns = [_likelihoods(view, policy, batch, temperature, bonus)]
        if together:
            columns.append(view.heads[value.head](view.states).float())
        return torch.cat(columns, 1)

    found = policy.read(batch, reader).unbind(1)
    values = found[3] if together else scores(value, batch)
    return Said(found[0], found[1].detach(), values, found[2])


def _likelihoods(view: View, policy: Role, batch: Batch, temperature: float, bonus: bool) -> Tensor:
    """`(n, 3)` of the targets shown: log-probability, entropy, and entropy with gradient or zeros."""
    head = view.heads[policy.head]
    seen = target_log_probs(view.states, head, batch.target[view.index], temperature, [entropy])
    if not bonus:
        return torch.cat([seen, torch.zeros_like(seen[:, :1])], 1)

    def spread(logits: Tensor, _: Tensor) -> Tensor:
        return entropy(logits / temperature, batch.target)

    gained, _ = compared(view.states, head, view.states.detach(), nn.Identity(), spread, None)
    return torch.cat([seen, gained.unsqueeze(1)], 1)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, `(targets,)`, and which of them were clipped.

    clip: how far from the rollout's value, `old`, it may gain: the larger of two errors counts, the value's own and
    that of the value held within reach (Ouyang et al. 2022's implementation; Huang et al. 2022, "The 37 Implementation
    Details of PPO", 9). 0: nothing is clipped.
    """
    free = (values - returns).square()
    if not clip:
        return free / 2, torch.zeros_like(free, dtype=torch.bool)
    held = (old + (values - old).clamp(-clip, clip) - returns).square()
    return torch.maximum(free, held) / 2, held > free
