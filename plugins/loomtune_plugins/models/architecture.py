"""Modules of transformers as loomtune needs them: born without weights, without caches, drawing from no global seed."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError

UNSEEDED = re.compile(r"(attn|attention).*drop|layerdrop|jitter")
DROPOUT = re.compile(r"^(?!summary|classif|cls).*(drop|pdrop)")
WINDOWED = {"full_attention", "sliding_attention"}


def trainable(config: Any) -> Any:
    """A copy of a config for training: no cache, and no randomness inside functions, which no seed would reach.

    What is switched off or left out is said once, on the first rank.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if UNSEEDED.search(name) and isinstance(value, int | float) and value > 0:
            setattr(text, name, 0.0)
            warn(f"{name}={value} of the model's config is set to 0: its draws could not be the same on every machine")
    if isinstance(weight := getattr(text, "router_aux_loss_coef", None), int | float) and weight > 0:
        warn(f"router_aux_loss_coef={weight} of the model's config is left out: no loss evens out its experts' load")
    return config


@functools.cache
def warn(text: str) -> None:
    """Says it once, on the first rank's stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(f"loomtune: {text}", file=sys.stderr)  # noqa: T201


def build(config: Any, attention: str, trusted: bool) -> Any:
    """A causal language model in `train()` mode on the current device; parameters hold fp32 garbage, tied where tied.

    Raises UserError where transformers cannot build it, or where it cannot be trained exactly here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    chosen = {"attn_implementation": attention} if attention else {}
    try:
        # Weights come from a source: drawing them here would take minutes and disturb the global seed.
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted, **chosen)
    except (ValueError, ImportError) as error:
        raise UserError.of(
            f"the model cannot be built: {error}", "set model.attention or model.path otherwise"
        ) from error
    model.tie_weights()
    _check(model)
    return model.train()


def _check(model: Any) -> None:
    """Refuses what would train silently wrong."""
    import inspect

    name, text = type(model).__name__, model.config.get_text_config()
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    cure = "set model.path to a decoder-only language model"
    known = {id(tensor) for part in (decoder, head) if part is not None for tensor in part.parameters()}
    if head is None or any(id(tensor) not in known for tensor in model.parameters()):
        raise UserError.of(f"{name} is more than a decoder and a linear head", cure)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise UserError.of(f"{name} takes no positions, so several samples cannot share a row", cure)
    strange = set(getattr(text, "layer_types", None) or ()) - WINDOWED
    if strange:
        what = f"{name} has {', '.join(sorted(strange))} layers, which mix the samples of a row"
        raise UserError.of(what, "choose a model of full or sliding attention")
    _check_dropout(model, text)


def _check_dropout(model: Any, text: Any) -> None:
    """Dropout modules are seeded by row and position later; dropout inside functions could not be."""
    modules = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for name, value in text.to_dict().items():
        if DROPOUT.match(name) and isinstance(value, float) and value > 0 and value not in modules:
            raise UserError.of(
                f"{type(model).__name__} applies {name}={value} by a function, whose draws no seed reaches",
                f"set {name} to 0 in the model's config.json",
            )


def blocks(module: Any) -> list[nn.Module]:
    """The repeated blocks, in order, by the classes that transformers names as not to be split."""
    names = set(module._no_split_modules or ())
    # A sharded module's class is a subclass made for it.
    found = [m for m in module.get_decoder().modules() if names & {base.__name__ for base in type(m).__mro__}]
    lists = [m for m in module.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=len, default=nn.ModuleList())
    return [block for block in longest if block in found] or list(longest)


def masks(config: Any, positions: Tensor, attention: Mapping[str, Any], chosen: str = "") -> Mapping[str, Any]:
    """Fits a 4-D mask `(rows, 1, length, length)` to the model, since transformers takes one as it is.

    Eager attention adds its mask, so a boolean one becomes numbers. A layer's sliding window is cut out of it.
    positions: `(rows, length)`. chosen: the attention; empty: as the config says.
    """
    mask, text = attention.get("attention_mask"), config.get_text_config()
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return attention
    if mask.dtype == torch.bool and (chosen or text._attn_implementation) == "eager":
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    window = getattr(text, "sliding_window", None)
    if not window or positions.shape[1] <= window:
        return {**attention, "attention_mask": mask}
    near = (positions[:, None, :, None] - positions[:, None, None, :]) < window
    narrow = mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {**attention, "attention_mask": narrow}
    both = {"full_attention": mask, "sliding_attention": narrow}
    return {**attention, "attention_mask": both if len(set(kinds)) > 1 else both[kinds[0]]}
