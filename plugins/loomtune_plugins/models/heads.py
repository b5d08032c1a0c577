"""Heads of models that do something to their logits after the linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError

# How each family changes its logits: `ForCausalLM.forward` of its modeling file in transformers.
DIVIDED = ("granite", "granitemoe", "granitemoeshared")
MULTIPLIED = ("cohere", "cohere2")
OTHERWISE = (
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logits_mup_width_multiplier",
)


class ScaledHead(nn.Module):
    """A linear head, then `times / over`, then `cap * tanh(logits / cap)` where the cap is not 0.

    The head keeps its place and its name in the model; this only calls it, and has its `in_features`.
    """

    def __init__(self, linear: nn.Linear, times: float, over: float, cap: float) -> None:
        super().__init__()
        self.linear, self.times, self.over, self.cap = linear, times, over, cap
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """From `(..., width)` to logits `(..., vocabulary)`."""
        logits: Tensor = self.linear(hidden) * self.times / self.over
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def head(module: Any) -> nn.Module:
    """The module that gives logits exactly as the model's own forward does. Raises UserError for unknown formulas."""
    linear: nn.Linear = module.get_output_embeddings()
    config = module.config.get_text_config()
    _check(config)
    times = float(config.logit_scale) if config.model_type in MULTIPLIED else 1.0
    over = float(config.logits_scaling) if config.model_type in DIVIDED else 1.0
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    return linear if times == over == 1.0 and not cap else ScaledHead(linear, times, over, cap)


def _check(config: Any) -> None:
    changed = [name for name in OTHERWISE if getattr(config, name, None) not in (None, 1, 1.0)]
    if changed and config.model_type not in (*DIVIDED, *MULTIPLIED):
        raise UserError.of(
            f"models of type {config.model_type} change their logits by {', '.join(changed)}, which is not known here",
            "set model.path to a model of another family",
        )
