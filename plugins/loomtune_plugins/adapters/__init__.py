"""Adapters."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Adapter
from loomtune.offers import Offer, Trait
from loomtune_plugins.adapters.settings import FullSettings, LoraSettings


@hookimpl
def adapters() -> Sequence[Offer[Adapter]]:
    """Gives the built-in adapters."""
    return (
        Offer(
            name="full",
            build="loomtune_plugins.adapters.full:Full",
            schema=FullSettings,
            summary="trains the model's own weights, all or all but the frozen ones",
        ),
        Offer(
            name="lora",
            build="loomtune_plugins.adapters.lora:Lora",
            schema=LoraSettings,
            summary="trains low-rank additions to linear layers (LoRA, rsLoRA, LoRA+, DoRA) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS}),
        ),
    )
