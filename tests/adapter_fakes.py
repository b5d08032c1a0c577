"""Weights in memory, and what tests of adapters do with a woven model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.contracts import WeightSource


class InMemory(WeightSource):
    """Reads from a mapping."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        return self.tensors[name] if where is None else self.tensors[name][where]


def train(module: nn.Module, tokens: Tensor, steps: int = 3, lr: float = 0.5) -> None:
    """Some steps of gradient descent on what is trained."""
    optimizer = torch.optim.SGD([parameter for parameter in module.parameters() if parameter.requires_grad], lr=lr)
    for _ in range(steps):
        module(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(module: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(input_ids=tokens).logits
    return found


def streamed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What an engine streams: each parameter once, tied ones under one name."""
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())
