"""Attention of transformers' models over rows that are cut over ranks, through its registry of attention functions.

Under a name of its own, which no function that makes masks knows, transformers (5.23,
`masking_utils._preprocess_mask_arguments`) leaves a 4-D mask as it is and makes none of its own. So layers that see a
stretch are handed the mask of whole rows, or none where attention is plainly causal.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.contracts import Batch
from loomtune.contracts.model import Exchange
from loomtune.errors import UserError
from loomtune_plugins.models.architecture import masks

PREFIX = "loomtune_exchanged_"
OURS = "loomtune_exchange"
"""Where an attention module keeps its exchange."""


def install(module: Any, exchange: Exchange | None) -> None:
    """Makes a model's attention exchange stretches for heads, or (None) makes it whole again.

    Raises UserError where the model's attention cannot be reached.
    """
    from transformers import AttentionInterface

    config = module.config.get_text_config()
    chosen = config._attn_implementation.removeprefix(PREFIX)
    if exchange is not None:
        _check(module)
        AttentionInterface.register(PREFIX + chosen, partial(_attend, chosen))
    module.config._attn_implementation = config._attn_implementation = chosen if exchange is None else PREFIX + chosen
    for part in module.get_decoder().modules():
        if hasattr(part, "config"):
            setattr(part, OURS, exchange)


def of(module: Any) -> Exchange | None:
    """The exchange that is installed."""
    found: Exchange | None = getattr(module.get_decoder(), OURS, None)
    return found


def _check(module: Any) -> None:
    # Models with a state that runs along the row mix positions outside of attention.
    if not module._supports_attention_backend or module._is_stateful:
        raise UserError.of(
            f"{type(module).__name__} mixes positions where no exchange reaches: its rows cannot be cut over ranks",
            "set sharding.sequence=1, or choose a model whose attention comes from transformers' registry",
        )


def whole_masks(module: Any, exchange: Exchange, batch: Batch, attention: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `masks` makes, for a batch that is this rank's stretch and a mask of whole rows.

    A mask of two dimensions says that attention is plainly causal. sdpa needs none then; eager, and a layer with a
    sliding window that is shorter than the rows, get one.
    """
    config = module.config.get_text_config()
    chosen, window = config._attn_implementation.removeprefix(PREFIX), getattr(config, "sliding_window", None)
    length = batch.tokens.shape[1] * exchange.size
    mask, narrow = attention.get("attention_mask"), window is not None and 0 < window < length
    causal = mask is None or mask.dim() == 2
    if causal and not narrow and chosen == "sdpa":
        return {**attention, "attention_mask": None}
    columns = torch.arange(length, device=batch.tokens.device).unsqueeze(0)
    if causal:
        mask = (columns.unsqueeze(2) >= columns.unsqueeze(1)).unsqueeze(1)
    positions = exchange.whole(batch.positions) if narrow and not causal else columns
    fitted = masks(config, positions, {**attention, "attention_mask": mask}, chosen)
    made = fitted["attention_mask"]
    if causal and chosen == "sdpa" and isinstance(made, dict):
        made = {**made, "full_attention": None}
    return {**fitted, "attention_mask": made}


def _attend(
    chosen: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As an attention function of transformers: queries `(rows, heads, stretch, width)` give `(rows, stretch, heads,
    width)`.

    Keys and values of fewer heads than ranks are repeated, so that each rank gets those of its queries.
    """
    exchange: Exchange = getattr(module, OURS)
    strange = [name for name, given in others.items() if isinstance(given, Tensor) and name != "position_ids"]
    if strange or query.shape[1] % exchange.size:
        what = f"{type(module).__name__} attends by {strange[0]}" if strange else f"a rank has {query.shape[1]} heads"
        raise UserError.of(f"{what}, which cannot be dealt out to {exchange.size} ranks", "set sharding.sequence=1")
    others.pop("position_ids", None)  # of a stretch
    times = exchange.size // math.gcd(key.shape[1], exchange.size)
    if times > 1:
        key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    query, key, value = exchange.to_heads(query, key, value)
    length = query.shape[2]
    assert attention_mask is None or attention_mask.shape[-2:] == (length, length), "masks are those of whole rows"
    here = _Here(module, query.shape[1] // key.shape[1])
    attended, _ = _function(chosen, module)(here, query, key, value, attention_mask, **others)
    return exchange.to_stretch(attended), None


class _Here:
    """An attention module as an attention function sees it, with this rank's heads."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _function(chosen: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function of a name. Each family has its own eager one, beside its attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if chosen != "eager":
        return ALL_ATTENTION_FUNCTIONS[chosen]  # type: ignore[no-any-return]
    homes = (sys.modules[base.__module__] for base in type(module).__mro__)
    return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))  # type: ignore[no-any-return]
