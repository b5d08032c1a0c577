"""Adapters."""

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Adapter
from loomtune.offers import Offer, Trait
from loomtune_plugins.adapters.adalora_settings import AdaLoraSettings
from loomtune_plugins.adapters.bottleneck.settings import BottleneckSettings
from loomtune_plugins.adapters.ia3_settings import IA3Settings
from loomtune_plugins.adapters.lora.qlora_settings import QloraSettings
from loomtune_plugins.adapters.oft_settings import CoftSettings, OftSettings
from loomtune_plugins.adapters.rules import preflight
from loomtune_plugins.adapters.settings import FullSettings, LoraSettings
from loomtune_plugins.adapters.virtual.settings import PrefixSettings, PromptSettings, PtuningSettings

__all__ = ["adapters", "preflight"]


@hookimpl
def adapters() -> Sequence[Offer[Adapter]]:
    """Gives the built-in adapters."""
    return (
        Offer(
            name="full",
            build="loomtune_plugins.adapters.full:Full",
            schema=FullSettings,
            summary="trains the model's own weights, all or all but the frozen ones",
            provides=frozenset({Trait.WHOLE_MODEL}),
        ),
        Offer(
            name="lora",
            build="loomtune_plugins.adapters.lora.lora:Lora",
            schema=LoraSettings,
            summary="trains low-rank additions to linear layers (LoRA, rsLoRA, LoRA+, DoRA) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS}),
        ),
        Offer(
            name="adalora",
            build="loomtune_plugins.adapters.adalora:AdaLora",
            schema=AdaLoraSettings,
            summary="LoRA whose ranks are shared out among layers by importance (AdaLoRA) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS, Trait.SHAPED_UPDATES}),
        ),
        Offer(
            name="oft",
            build="loomtune_plugins.adapters.oft:Oft",
            schema=OftSettings,
            summary="trains rotations of linear layers' inputs (OFT) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS}),
        ),
        Offer(
            name="coft",
            build="loomtune_plugins.adapters.oft:Coft",
            schema=CoftSettings,
            summary="OFT whose rotations stay near the identity (COFT) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS, Trait.SHAPED_UPDATES}),
        ),
        Offer(
            name="ia3",
            build="loomtune_plugins.adapters.ia3:IA3",
            schema=IA3Settings,
            summary="trains factors of keys, values and inner activations (IA3) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS}),
        ),
        Offer(
            name="qlora",
            build="loomtune_plugins.adapters.lora.qlora:Qlora",
            schema=QloraSettings,
            summary="LoRA on a base whose linear layers are kept in 4 bits (QLoRA)",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS}),
            extra="quantised",
        ),
        Offer(
            name="bottleneck",
            build="loomtune_plugins.adapters.bottleneck.bottleneck:Bottleneck",
            schema=BottleneckSettings,
            summary="trains small networks added after attention and MLP (Houlsby) or after each block (Pfeiffer)",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS, Trait.UNMERGEABLE}),
        ),
        Offer(
            name="prompt",
            build="loomtune_plugins.adapters.virtual.prompt:Prompt",
            schema=PromptSettings,
            summary="trains embeddings of virtual tokens before each sample (prompt tuning) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.VIRTUAL_TOKENS, Trait.UNMERGEABLE}),
        ),
        Offer(
            name="ptuning",
            build="loomtune_plugins.adapters.virtual.ptuning:Ptuning",
            schema=PtuningSettings,
            summary="trains virtual tokens through a small network (P-tuning) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.VIRTUAL_TOKENS, Trait.UNMERGEABLE}),
        ),
        Offer(
            name="prefix",
            build="loomtune_plugins.adapters.virtual.prefix:Prefix",
            schema=PrefixSettings,
            summary="trains keys and values before each sample in every layer (prefix tuning) in peft's format",
            provides=frozenset({Trait.ADAPTER_OFF, Trait.VIRTUAL_TOKENS, Trait.UNMERGEABLE}),
        ),
    )
