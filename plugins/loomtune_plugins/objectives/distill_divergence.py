"""How far two distributions over the vocabulary are apart, a chunk of targets at a time. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError
from loomtune.toolkit import kl

CHUNK = 256
"""Targets of which the logits of both networks exist at once, and a dozen buffers of their size. On a CPU a chunk of
1,024 took twice as long with 32,000 tokens, for the system gives out and clears so much memory anew each time."""

Compare = Callable[[Tensor, Tensor], Tensor]
"""From the policy's and the other's logits `(n, vocabulary)` fp32 to a number `(n,)` of each target."""


def divergence(policy: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Agarwal et al. 2024, "On-Policy Distillation", equation 4, `(n,)` in nats, of logits `(n, vocabulary)`.

    With the mixture m = beta teacher + (1 - beta) policy: beta KL(teacher || m) + (1 - beta) KL(policy || m). At both
    ends, where that is 0, what it tends to when divided by beta or (1 - beta): KL(teacher || policy) at 0 and
    KL(policy || teacher) at 1. Both logits are divided by the temperature, and no square of it makes up for that.
    """
    if policy.shape != teacher.shape:
        raise UserError.of(
            f"the teacher has {teacher.shape[-1]} logits for each token and the policy {policy.shape[-1]}",
            "set roles.teacher.model.path to a model with as many embeddings",
        )
    ours, theirs = ((logits / temperature).log_softmax(-1) for logits in (policy, teacher))
    if beta == 0:
        return kl(theirs, ours)
    if beta == 1:
        return kl(ours, theirs)
    mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
    return beta * kl(theirs, mixture) + (1 - beta) * kl(ours, mixture)


def observed(policy: Tensor, teacher: Tensor) -> Tensor:
    """`(n, 2)` of logits: KL(teacher || policy), and the policy's entropy."""
    ours = policy.log_softmax(-1)
    return torch.stack([kl(teacher.log_softmax(-1), ours), -(ours.exp() * ours).sum(-1)], -1)


def compared(
    hidden: Tensor,
    head: nn.Module,
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    compare: Compare,
    look: Compare | None = observed,
) -> tuple[Tensor, Tensor]:
    """What `compare` says of each target `(targets,)`, and what `look` sees `(targets, numbers)`, without gradient.

    hidden, teacher_hidden: `(targets, width)`, the widths of both. Both heads are called here and never again, where
    sharded networks have their weights together: gradients of hidden states and of the head are taken chunk by chunk
    along with the values. So the values have to be summed with equal weights, as a mean over a step does.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    learns = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    made: tuple[Tensor, Tensor] = _Compared.apply(  # type: ignore[no-untyped-call]
        hidden, teacher_hidden, head, teacher_head, compare, look, learns, *parameters
    )
    return made


class _Compared(torch.autograd.Function):
    """Values, with the gradient of their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher_hidden: Tensor,
        head: nn.Module,
        teacher_head: nn.Module,
        compare: Compare,
        look: Compare | None,
        learns: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        values = hidden.new_zeros(len(hidden), dtype=torch.float32)
        seen: list[Tensor] = []
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)] if learns else []
        for start in range(0, max(1, len(hidden)), CHUNK):  # once without targets: `look` says how wide it is
            here = slice(start, start + CHUNK)
            theirs = teacher_head(teacher_hidden[here]).float()
            with torch.set_grad_enabled(learns):
                some = hidden[here].detach().requires_grad_(learns)
                ours = head(some).float()
                value = compare(ours, theirs)
                total = value.sum()
            if learns:
                first, *others = torch.autograd.grad(total, [some, *parameters])
                gradients[0][here] = first
                for gathered, part in zip(gradients[1:], others, strict=True):
                    gathered.add_(part)
            values[here] = value.detach()
            if look is not None:
                seen.append(look(ours.detach(), theirs))
        ctx.save_for_backward(*gradients)
        looked = torch.cat(seen) if seen else values.new_zeros((len(values), 0))
        ctx.mark_non_differentiable(looked)
        return values, looked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
        scale = gradient[0] if len(gradient) else gradient.new_zeros(())
        assert bool((gradient == scale).all()), "the divergences of targets are summed with equal weights"
        hidden, *parameters = (saved * scale for saved in ctx.saved_tensors)
        return hidden, None, None, None, None, None, None, *parameters
