"""Saved adapters on their base, as other programs open them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Asked = Callable[[Tensor], Tensor]
"""Token ids `(1, length)` to logits `(1, length, vocabulary)`."""


def by_peft(module: nn.Module, folder: Path) -> Asked | None:
    """A model of transformers with the adapter of a folder; None where the model is not of the kind that peft opens."""
    if not hasattr(module, "prepare_inputs_for_generation"):
        return None
    from loomtune_plugins.adapters.wrapped.wrapping import quiet

    quiet()
    from peft import PeftModel

    device = str(next(module.parameters()).device)  # peft would load to the fastest that there is
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for a property by its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return asked(PeftModel.from_pretrained(module, folder, torch_device=device))


def asked(model: Any) -> Asked:
    """Calls a model as transformers' are called; peft gives logits of virtual tokens too, which stand before a row."""
    model.eval()

    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = model(tokens).logits[:, -tokens.shape[1] :]
        return found

    return logits
