"""Merging by peft's own layers: one linear layer at a time, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

LAYER = "layer"


def merged(config: Any, base: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A linear layer's tensors with what was added in them. parts: by their names inside the wrapped layer.

    config: peft's, whose target is `layer`.
    """
    rows, columns = base["weight"].shape
    with torch.device("meta"):
        linear = nn.Linear(columns, rows, bias="bias" in base)
        woven: Any = inject_adapter_in_model(copy.deepcopy(config), nn.ModuleDict({LAYER: linear}))
    woven.to_empty(device="cpu").eval()
    wrapped = woven[LAYER]
    found = dict(wrapped.named_parameters())
    with torch.no_grad():
        for leaf, tensor in base.items():
            found[f"base_layer.{leaf}"].copy_(tensor)
        for name, tensor in parts.items():
            found[name].copy_(tensor)
        wrapped.merge(safe_merge=True)
    return {leaf: getattr(wrapped.base_layer, leaf).detach() for leaf in base}
