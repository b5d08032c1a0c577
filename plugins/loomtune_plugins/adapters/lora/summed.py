"""Several LoRAs of the same layers as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loomtune_plugins.adapters.wrapped.files import PREFIX, A, B

Term = tuple[Tensor, Tensor, float]
"""A `(rank, inputs)`, B `(outputs, rank)` and the scale of what is added, `scale * B A`."""


def summed(layers: Mapping[str, Sequence[Term]], scale: float) -> tuple[int, dict[str, Tensor]]:
    """The rank, and tensors by their names in peft's files, of one LoRA of this scale that adds the sum of all.

    Factors stand side by side, and what scales differ by is in B. Every layer has the rank of the largest, filled with
    zeros: servers such as vLLM read one rank and one alpha, and no patterns.
    """
    rank, found = max(sum(len(a) for a, _, _ in terms) for terms in layers.values()), dict[str, Tensor]()
    for layer, terms in layers.items():
        a = torch.cat([a for a, _, _ in terms])
        b = torch.cat([b * (own / scale) for _, b, own in terms], dim=1)
        found[f"{PREFIX}{layer}{A}"] = pad(a, (0, 0, 0, rank - len(a)))
        found[f"{PREFIX}{layer}{B}"] = pad(b, (0, rank - len(a)))
    return rank, found


def scale_of(config: Any) -> float:
    """What peft multiplies `B A` by."""
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
