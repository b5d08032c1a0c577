"""First values of what LoRA adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loomtune.contracts import WeightSource
from loomtune.world import derive
from loomtune_plugins.adapters.woven import Added


def first(added: Added, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
    """A as torch's linear layers begin, B of zeros; a magnitude of DoRA is the length of each row of the base."""
    if added.part == "lora_magnitude_vector":
        # Liu et al. 2024, equation 5, with B = 0.
        return torch.linalg.vector_norm(base.read(f"{added.layer}.weight").float(), dim=1)
    if added.part == "lora_B":
        return torch.zeros(shape)
    return draw(shape, derive(seed, added.layer, added.part))


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """First values of A, as in Microsoft's LoRA: those of torch's linear layers (He et al. 2015 with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
