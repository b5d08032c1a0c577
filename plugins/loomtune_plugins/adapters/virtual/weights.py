"""First values of the encoders of virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.contracts import WeightSource
from loomtune.world import derive


def drawn(encoder: nn.Module, part: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """As torch's layers begin: embeddings normal of deviation 1, linear layers uniform in +-1/sqrt(inputs)."""
    layer = encoder.get_submodule(part.rpartition(".")[0])
    generator = torch.Generator().manual_seed(derive(seed, "virtual", part))
    if isinstance(layer, nn.Embedding):
        return torch.randn(shape, generator=generator)
    assert isinstance(layer, nn.Linear), f"nothing is known of {part}"
    return torch.empty(shape).uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)


def embedding(module: Any, base: WeightSource) -> str:
    """The stored name of the model's embedding; where it is tied, that may be any of its names."""
    weight, known = module.get_input_embeddings().weight, base.shapes()
    names = (name for name, tensor in module.named_parameters(remove_duplicate=False) if tensor is weight)
    return str(next(name for name in names if name in known))


def rows(base: WeightSource, name: str, ids: Sequence[int]) -> Tensor:
    """`(ids, width)` fp32: rows of a matrix, of which no more than these are read."""
    return torch.cat([base.read(name, (slice(i, i + 1), slice(None))).float() for i in ids])


def tokens(vocabulary: int, count: int, seed: int) -> list[int]:
    """Ids drawn from the whole vocabulary, each at most once where there are enough."""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(derive(seed, "virtual", "tokens")))
    return [int(order[i % vocabulary]) for i in range(count)]


def as_wide(like: Tensor, seed: int) -> Tensor:
    """Normal values of the shape and the deviation of some embeddings."""
    generator = torch.Generator().manual_seed(derive(seed, "virtual", "random"))
    return torch.randn(like.shape, generator=generator) * like.std(correction=0)
