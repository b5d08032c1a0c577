"""Log-probabilities of targets, without ever holding the logits of more than a chunk of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loomtune.contracts.batch import Batch
from loomtune.contracts.role import Role, View

CHUNK = 1024
"""Targets whose logits exist at once; a 128k vocabulary then takes 0.5 GB in fp32."""


def log_probs(role: Role, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Log-probability `(targets,)` fp32 of each target given what comes before it, with gradient.

    Only positions that predict a target reach the head. temperature: divides the logits, as it did when sampling.
    """

    def reader(view: View) -> Tensor:
        return target_log_probs(view.states, view.heads[role.head], batch.target[view.index], temperature)

    result: Tensor = role.read(batch, reader)
    return result


def target_log_probs(hidden: Tensor, head: nn.Module, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `(targets,)` of `target` `(targets,)` under `head(hidden)`, hidden `(targets, width)`.

    Beyond one chunk the logits are computed again in the backward pass instead of being kept.
    """

    def part(some: Tensor, labels: Tensor) -> Tensor:
        logits = head(some).float()
        scaled = logits if temperature == 1.0 else logits / temperature
        return -F.cross_entropy(scaled, labels, reduction="none")

    if len(target) <= CHUNK:
        return part(hidden, target)
    pairs = zip(torch.split(hidden, CHUNK), torch.split(target, CHUNK), strict=True)
    return torch.cat([checkpoint(part, some, labels, use_reentrant=False) for some, labels in pairs])


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sums `(segments,)` of one value a target `(targets,)`, for instance log-probabilities of whole answers."""
    return values.new_zeros(len(batch.parents)).index_add(0, batch.row, values)
