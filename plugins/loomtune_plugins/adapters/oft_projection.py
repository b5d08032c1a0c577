"""The optimizer's step of COFT, which ends in a ball around the identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loomtune.contracts import Optimizer, ParameterGroup, StateKind


class Projected(Optimizer):
    """The run's optimizer, after whose steps no block's skew matrix is longer than `eps / sqrt(blocks)`.

    parts: gives the rotations of each layer.
    """

    def __init__(self, inner: Optimizer, eps: float, parts: Callable[[], Sequence[Mapping[str, nn.Parameter]]]) -> None:
        self._inner, self._eps, self._parts = inner, eps, parts

    @property
    def learning_rate(self) -> float:
        """The inner one's."""
        return self._inner.learning_rate

    @property
    def clip(self) -> float:
        """The inner one's."""
        return self._inner.clip

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The inner optimizer, hooked into after each step."""
        built = self._inner.build(groups)
        rotations = [rotation for layer in self._parts() for rotation in layer.values()]
        built.register_step_post_hook(lambda *_: project(rotations, self._eps))
        return built

    def state(self) -> Mapping[str, StateKind]:
        """The inner one's: where the ball ends follows from the parameters alone."""
        return self._inner.state()


@torch.no_grad()
def project(rotations: Sequence[nn.Parameter], eps: float) -> None:
    """Shortens what is too long. rotations: `(blocks, entries above the diagonal)`, cut along blocks if at all."""
    for parameter in rotations:
        rows = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # Each entry stands twice in its matrix. A hair within the ball, so that projecting again changes nothing.
        longest = eps / math.sqrt(parameter.shape[0]) * (1 - 1e-6)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True) * math.sqrt(2)
        rows.copy_(torch.where(length > longest, rows * (longest / length), rows))
