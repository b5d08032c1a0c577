"""A model beside peft's encoder of virtual tokens, and how the model is called with what the encoder makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError

Lead = Callable[["Woven", dict[str, Any]], dict[str, Any]]


class Woven(nn.Module):
    """Both, side by side: the model keeps its names and its ties, and computes as it did where nothing leads a row.

    on: whether what the encoder makes stands before samples. length: how many virtual tokens that are.
    """

    def __init__(self, base: nn.Module, encoder: nn.Module, length: int) -> None:
        super().__init__()
        self.base, self.encoder, self.length = base, encoder, length
        self.on = True

    def made(self, device: torch.device) -> Tensor:
        """What the encoder makes of all virtual tokens, `(1, length, ...)`; a call, which strategies gather around."""
        return made(self.encoder, self.length, device)

    def before_calls(self, lead: Lead) -> None:
        """Lets every call of the whole model be led. Training calls its parts; who calls the whole of it generates."""

        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if not self.on:
                return None
            assert len(given) <= 1, "what follows the token ids is told by its name"
            return (), lead(self, {**named, **({"input_ids": given[0]} if given else {})})

        self.base.register_forward_pre_hook(hook, with_kwargs=True)


def made(encoder: nn.Module, length: int, device: torch.device) -> Tensor:
    """`(1, length, ...)`: one row of all virtual tokens, as peft encodes it."""
    vectors: Tensor = encoder(torch.arange(length, device=device).unsqueeze(0))
    return vectors


def fitted(config: Any, module: Any) -> Any:
    """A config that knows the model's sizes, as peft derives them. Raises UserError where the model tells none."""
    from peft.utils.other import _prepare_prompt_learning_config

    if getattr(module, "config", None) is None:
        raise UserError.of(
            f"{type(module).__name__} has no config of transformers to read its sizes from", "choose adapter=lora"
        )
    config = _prepare_prompt_learning_config(config, module.config)
    config.num_transformer_submodules = 1
    return config


def is_first(call: dict[str, Any]) -> bool:
    """Whether a call of the model begins its rows: no earlier one has left keys and values."""
    cache = call.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def begins_at(call: dict[str, Any]) -> Tensor:
    """`(rows,)`: the column in which each row begins, behind what pads it on the left."""
    mask = call.get("attention_mask")
    if mask is None:
        ids: Tensor = call["input_ids"]
        return ids.new_zeros(len(ids))
    assert mask.dim() == 2, "generation masks tokens, and not pairs of them"
    padding: Tensor = mask.cumsum(1) == 0
    return padding.sum(1)


def inserted(old: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """`(rows, columns + new)`: each row of old with new `(new,)` before its column `at`."""
    columns = torch.arange(old.shape[1] + len(new), device=old.device)
    into = columns - at.unsqueeze(1)  # (rows, columns + new)
    kept = old.gather(1, torch.where(into < 0, columns, (columns - len(new)).clamp(min=0)))
    return torch.where((into >= 0) & (into < len(new)), new.to(old)[into.clamp(0, len(new) - 1)], kept)
