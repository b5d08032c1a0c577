"""A prefix as transformers' attention takes it: keys and values in a cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from loomtune.errors import UserError
from loomtune_plugins.adapters.virtual.woven import Woven, is_first

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `(rows, heads, length, head width)` each."""


OTHERWISE = ("per_layer_config", "num_kv_shared_layers", "kv_lora_rank", "multi_query")
"""Settings of transformers' models whose layers keep keys and values of other shapes than peft's one, or share them."""


def check(module: Any) -> None:
    """Raises UserError where peft's one shape for all layers, seen from everywhere, is not what the model has."""
    text, cure = module.config.get_text_config(), "choose adapter=prompt, or a model of full attention in every layer"
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    if "sliding_attention" in kinds if kinds is not None else window:
        raise UserError.of(f"the model's sliding window of {window} tokens would leave the prefix behind", cure)
    told = text.to_dict()
    if other := [name for name in OTHERWISE if told.get(name)]:
        raise UserError.of(f"the model's layers differ in their keys and values ({', '.join(other)})", cure)
    if "past_key_values" not in inspect.signature(module.get_decoder().forward).parameters:
        raise UserError.of(f"{type(module).__name__} takes no keys and values from outside", cure)


def pairs(made: Tensor, config: Any, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Every layer's keys and values from what the encoder makes, `(1, length, layers * 2 * heads * width)`.

    As peft cuts it (`PeftModel.get_prompt`). The rows share one storage.
    """
    heads = config.num_attention_heads
    cut = made.view(1, made.shape[1], config.num_layers * 2, heads, config.token_dim // heads)
    layers = cut.permute(2, 0, 3, 1, 4).expand(-1, rows, -1, -1, -1).split(2)  # type: ignore[no-untyped-call]
    return [(layer[0], layer[1]) for layer in layers]


class HeldLayer(DynamicLayer):  # type: ignore[misc]
    """Joins a prefix with the keys and values that it is given, and keeps nothing: a block may be computed again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Both with the prefix before them, in their own types."""
        keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def held(layers: Pairs) -> Cache:
    """A cache that never grows."""
    return Cache(layers=[HeldLayer(keys, values) for keys, values in layers])


def widened(attention: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    """A kernel's mask with so many columns more at its left, which everyone sees.

    `(rows, length)` of ones, or `(rows, 1, length, length)` to add or of bools.
    """
    mask = attention["attention_mask"]
    free = 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0
    return {**attention, "attention_mask": torch.cat([mask.new_full((*mask.shape[:-1], length), free), mask], -1)}


def lead(config: Any, woven: Woven, call: dict[str, Any]) -> dict[str, Any]:
    """A call of the whole model: the first of some rows finds the prefix in its cache, or is lent one."""
    changed, ids, cache = dict(call), call["input_ids"], call.get("past_key_values")
    if (mask := call.get("attention_mask")) is not None:
        changed |= widened({"attention_mask": mask}, woven.length)
    if (positions := call.get("position_ids")) is not None:
        changed["position_ids"] = positions + woven.length
    if not is_first(call):
        return changed
    kept = woven.base.get_input_embeddings().weight.dtype  # type: ignore[operator]
    layers = pairs(woven.made(ids.device).to(kept), config, len(ids))
    if cache is None:
        return {**changed, "past_key_values": held(layers), "use_cache": False}
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return changed
