"""Adapters of others that stay frozen beneath the one that is trained."""

from __future__ import annotations

from peft import LoraConfig

from loomtune_plugins.adapters.wrapped.files import PeftFolder


def config_of(folder: PeftFolder) -> LoraConfig:
    """peft's config for exactly the layers that the folder adapts; what is frozen has no dropout."""
    said = folder.config
    return LoraConfig(
        r=said.get("r", 8),
        lora_alpha=said.get("lora_alpha", 8),
        use_rslora=bool(said.get("use_rslora")),
        rank_pattern=dict(said.get("rank_pattern") or {}),
        alpha_pattern=dict(said.get("alpha_pattern") or {}),
        target_modules=list(folder.layers),
    )
