"""Merging by peft's own layers: one linear layer at a time, in fp32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

LAYER = "layer"


def merged(
    configs: Mapping[str, Any],
    base: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    settle: Callable[[nn.Module], None],
) -> dict[str, Tensor]:
    """A linear layer's tensors with what was added in them. parts: by their names inside the wrapped layer.

    configs: peft's, whose target is `layer`, by the name of the adapter. settle: see `Wrapping.settle`.
    """
    woven: Any = nn.ModuleDict({LAYER: _layer(base, next(iter(configs.values())))})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant to be there
        for name, config in configs.items():
            woven = inject_adapter_in_model(copy.deepcopy(config), woven, adapter_name=name)
    settle(woven)
    woven.to_empty(device="cpu").eval()
    wrapped = woven[LAYER]
    found = dict(wrapped.named_parameters())
    with torch.no_grad():
        for leaf, tensor in base.items():
            found[f"base_layer.{leaf}"].copy_(tensor)
        for name, tensor in parts.items():
            found[name].copy_(tensor)
        wrapped.merge(safe_merge=True, adapter_names=list(configs))
    return {leaf: getattr(wrapped.base_layer, leaf).detach() for leaf in base}


def _layer(base: Mapping[str, Tensor], config: Any) -> nn.Module:
    """A layer of these shapes on the meta device; GPT-2 keeps its matrices the other way round."""
    rows, columns = base["weight"].shape
    with torch.device("meta"):
        if getattr(config, "fan_in_fan_out", False):
            from transformers.pytorch_utils import Conv1D

            turned: nn.Module = Conv1D(columns, rows)
            return turned
        return nn.Linear(columns, rows, bias="bias" in base)


def with_rows(table: Tensor, rows: Tensor, ids: list[int]) -> Tensor:
    """A matrix with some of its rows replaced."""
    return table.index_copy(0, torch.tensor(ids), rows.to(table.dtype))
