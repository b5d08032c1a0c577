"""The optimizer's step of COFT, which ends in a ball around the identity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def project_after(optimizer: torch.optim.Optimizer, layers: Sequence[Mapping[str, nn.Parameter]], eps: float) -> None:
    """After each step no block's skew matrix is longer than `eps / sqrt(blocks)`. layers: the rotations of each.

    Nothing is remembered: where the ball ends follows from the parameters alone.
    """
    rotations = [rotation for layer in layers for rotation in layer.values()]
    optimizer.register_step_post_hook(lambda *_: project(rotations, eps))


@torch.no_grad()
def project(rotations: Sequence[nn.Parameter], eps: float) -> None:
    """Shortens what is too long. rotations: `(blocks, entries above the diagonal)`, cut along blocks if at all."""
    for parameter in rotations:
        rows = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # Each entry stands twice in its matrix. A hair within the ball, so that projecting again changes nothing.
        longest = eps / math.sqrt(parameter.shape[0]) * (1 - 1e-6)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True) * math.sqrt(2)
        rows.copy_(torch.where(length > longest, rows * (longest / length), rows))
