"""Log-probabilities of targets, without ever holding the logits of more than a chunk of them."""

from __future__ import annotations

from typing import Any

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
        if type(scaled) is not Tensor or scaled.device.type != "cpu":
            return -F.cross_entropy(scaled, labels, reduction="none")
        chosen: Tensor = _InPlace.apply(scaled, labels)  # type: ignore[no-untyped-call]
        return chosen

    if len(target) <= CHUNK:
        return part(hidden, target)
    pairs = zip(torch.split(hidden, CHUNK), torch.split(target, CHUNK), strict=True)
    return torch.cat([checkpoint(part, some, labels, use_reentrant=False) for some, labels in pairs])


BLOCK = 64
"""Rows of logits that are turned into gradients at once, so that they stay in the cache between two passes."""


class _InPlace(torch.autograd.Function):
    """Log-probabilities, and then gradients, written over the logits: one buffer of `(targets, vocabulary)`, not four.

    On a CPU each such buffer costs as much time to be given by the system as to be filled. Whoever else kept the logits
    for his own backward pass hears an error from autograd, never a wrong number.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        buffer = logits.detach()
        torch.ops.aten._log_softmax.out(buffer, -1, False, out=buffer)
        ctx.save_for_backward(labels)
        ctx.buffer = buffer
        return buffer[torch.arange(len(labels)), labels]  # no view: FSDP2 warns of one that leaves a module

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (labels,) = ctx.saved_tensors
        buffer, ctx.buffer = ctx.buffer, None
        assert buffer is not None, "log-probabilities are differentiated once: their buffer is the gradient's"
        for rows, factors in zip(torch.split(buffer, BLOCK), torch.split(gradient, BLOCK), strict=True):
            rows.exp_().mul_(-factors.unsqueeze(1))
        buffer[torch.arange(len(labels)), labels] += gradient
        return buffer, None


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sums `(segments,)` of one value a target `(targets,)`, for instance log-probabilities of whole answers."""
    return values.new_zeros(len(batch.parents)).index_add(0, batch.row, values)
