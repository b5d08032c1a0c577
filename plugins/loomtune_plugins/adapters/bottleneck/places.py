"""Where in a transformer's blocks bottleneck adapters belong.

transformers has no name for a block's parts that all families keep, but their classes say what they are. A block is
taken only where every child of it is understood: one attention, one MLP, and else norms, dropout and activations. What
adds to its stream in another way (state-space layers, a second MLP, per-layer inputs) is refused, not adapted wrong.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from loomtune.errors import UserError
from loomtune_plugins.adapters.bottleneck.settings import ATTENTION, BLOCK, MLP

MLPS = ("mlp", "feedforward", "feed_forward", "ffn", "moe")
OTHERS = ("mamba", "conv", "delta", "recurrent", "rwkv", "lstm", "router", "cross", "xlnet", "cpmant")
"""Words in the names of classes that are neither, or (XLNet, CPM-Ant) add to the stream within themselves."""
CURE = "choose adapter=lora, or a model whose blocks are attention and an MLP, such as a Llama"


@dataclass(frozen=True, slots=True)
class Place:
    """A module to be added. owner: the block it belongs to. after: whose output it is given."""

    owner: nn.Module
    after: nn.Module
    name: str


def blocks(module: Any) -> nn.ModuleList:
    """The repeated blocks: the longest list of modules that lies in no other, as a mixture's experts do."""
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    lists = {name: part for name, part in decoder.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise UserError.of(f"{type(module).__name__} has no list of blocks that could be adapted", CURE)
    return max(outer, key=len)


def width(module: Any) -> int:
    """Of the stream that blocks add to."""
    config = getattr(module, "config", None)
    text: Any = config.get_text_config() if config is not None else None
    if getattr(text, "hidden_size", None) is None:
        raise UserError.of(f"the config of {type(module).__name__} does not say how wide its blocks are", CURE)
    return int(text.hidden_size)


def places(block: nn.Module, variant: str) -> list[Place]:
    """Where a block is adapted. Raises UserError, naming what was found, where that is not certain."""
    attention, mlp = _sublayers(block)
    if variant == "houlsby":
        return [Place(block, attention, ATTENTION), Place(block, mlp, MLP)]
    if _normed_last(block):
        raise UserError.of(
            f"{type(block).__name__} ends in a norm, so a Pfeiffer adapter has no place between its sum and its end",
            "set adapter.variant=houlsby",
        )
    return [Place(block, block, BLOCK)]


def _sublayers(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(attention, what ends the MLP); each gives what is then added to the stream."""
    kinds: dict[str, list[str]] = {"attention": [], "mlp": [], "other": []}
    for name, child in block.named_children():
        if (kind := _kind(child)) != "passive":
            kinds[kind].append(name)
    # Families that write their MLP into the block (OPT) name its two layers so.
    if not kinds["mlp"] and kinds["other"] == ["fc1", "fc2"]:
        kinds = {**kinds, "mlp": ["fc2"], "other": []}
    attention, mlp, other = kinds.values()
    if len(attention) != 1 or len(mlp) != 1 or other:
        found = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children()) or "nothing"
        raise UserError.of(
            f"bottleneck adapters belong after one attention and one MLP, and {type(block).__name__} has {found}",
            CURE,
        )
    found_modules = block.get_submodule(attention[0]), block.get_submodule(mlp[0])
    for part in found_modules:
        # BLOOM and MPT hand a sublayer the stream, which it adds to by itself.
        if "residual" in inspect.signature(part.forward).parameters:
            raise UserError.of(
                f"{type(part).__name__} adds to the stream within itself, where no adapter reaches", CURE
            )
    return found_modules


def _kind(child: nn.Module) -> str:
    """`attention`, `mlp`, `passive` or `other`."""
    name = type(child).__name__.lower()
    if "norm" in name:
        return "passive"
    if any(word in name for word in OTHERS):
        return "other"
    if "attention" in name or "attn" in name:
        return "attention"
    if any(word in name for word in MLPS):
        return "mlp"
    return "passive" if next(child.parameters(), None) is None else "other"


def _normed_last(block: nn.Module) -> bool:
    """True where the sum itself is normed, as in the first transformers: GPT-1, OPT 350m."""
    return getattr(block, "do_layer_norm_before", True) is False or type(block).__module__.endswith(".modeling_openai")
