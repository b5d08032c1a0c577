"""Log-probabilities of targets, without ever holding the logits of more than a chunk of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


PLAIN: set[type] = {Tensor, nn.Parameter}
"""Types of tensors that are memory and nothing else. A rehearsal of what CPUs do adds its own."""

Look = Callable[[Tensor, Tensor], Tensor]
"""From logits `(n, vocabulary)` fp32 and targets `(n,)` to a number `(n,)` of each; it must leave the logits alone."""


def observed(role: Role, batch: Batch, looks: Sequence[Look], *, temperature: float = 1.0) -> list[Tensor]:
    """`log_probs`, and then what each look makes of the same logits, `(targets,)` each, without gradient."""

    def reader(view: View) -> Tensor:
        target = batch.target[view.index]
        return target_log_probs(view.states, view.heads[role.head], target, temperature, looks)

    found: Tensor = role.read(batch, reader)
    return list(found.unbind(1)) if looks else [found]


def entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of the distribution over the vocabulary, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def log_sum_squares(logits: Tensor, target: Tensor) -> Tensor:
    """Log of the sum of squared probabilities: how likely two draws are the same token."""
    return torch.logsumexp(2 * logits.log_softmax(-1), -1)


def kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) `(n,)` in nats of two distributions, given by their log-probabilities `(n, vocabulary)`."""
    return (one.exp() * (one - other)).sum(-1)


def target_log_probs(
    hidden: Tensor, head: nn.Module, target: Tensor, temperature: float = 1.0, looks: Sequence[Look] = ()
) -> Tensor:
    """Log-probabilities `(targets,)` of `target` `(targets,)` under `head(hidden)`, hidden `(targets, width)`.

    Beyond one chunk the logits are computed again in the backward pass instead of being kept.
    looks: with any, `(targets, 1 + looks)`, what they make of the divided logits behind the log-probability.
    """

    def part(some: Tensor, labels: Tensor) -> Tensor:
        logits = head(some).float()
        if temperature != 1.0:
            logits = logits / temperature
        with torch.no_grad():
            seen = [look(logits, labels) for look in looks]
        chosen = _chosen(logits, labels)
        return torch.stack([chosen, *seen], -1) if looks else chosen

    if len(target) <= CHUNK:
        return part(hidden, target)
    pairs = zip(torch.split(hidden, CHUNK), torch.split(target, CHUNK), strict=True)
    return torch.cat([checkpoint(part, some, labels, use_reentrant=False) for some, labels in pairs])


def _chosen(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels; the logits may be written over."""
    if type(logits) not in PLAIN or logits.device.type != "cpu":
        return -F.cross_entropy(logits, labels, reduction="none")
    chosen: Tensor = _InPlace.apply(logits, labels)  # type: ignore[no-untyped-call]
    return chosen


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
        ctx.save_for_backward(labels, buffer)  # not an attribute: a checkpoint lets go of what is saved, and of no more
        return buffer[torch.arange(len(labels)), labels]  # no view: FSDP2 warns of one that leaves a module

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        labels, buffer = ctx.saved_tensors  # written over: whoever differentiates a second time hears an error
        for rows, factors in zip(torch.split(buffer, BLOCK), torch.split(gradient, BLOCK), strict=True):
            rows.exp_().mul_(-factors.unsqueeze(1))
        buffer[torch.arange(len(labels)), labels] += gradient
        return buffer, None


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sums `(segments,)` fp64 of one value a target `(targets,)`, for instance log-probabilities of whole answers.

    In double precision: what is compared are differences, a few nats, between sums of thousands.
    """
    sums = torch.zeros(len(batch.parents), dtype=torch.float64, device=values.device)
    return sums.index_add(0, batch.row, values.double())
