"""Settings of bottleneck adapters. What is left out is as `adapter.path` says, or else as written here."""

from dataclasses import dataclass

from loomtune.settings import option

VARIANTS = ("houlsby", "pfeiffer")
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
ATTENTION, MLP, BLOCK = "bottleneck_attention", "bottleneck_mlp", "bottleneck_block"
"""What the added modules are called within their block, by what they come after."""


@dataclass
class BottleneckSettings:
    """Small networks after the sublayers of each block. Usual learning rates are 1e-4 to 1e-3."""

    variant: str = option(
        "",
        "`houlsby`: one after attention and one after the MLP; `pfeiffer`: one after each block; empty: houlsby",
        among=("", *VARIANTS),
    )
    reduction: int = option(0, "the model's width over that of the bottleneck; 0: 16", least=0)
    size: int = option(0, "width of the bottleneck itself, in the place of `reduction`; 0: by `reduction`", least=0)
    activation: str = option(
        "", "between the two layers: gelu, relu, silu or tanh; empty: gelu", among=("", *ACTIVATIONS)
    )
    dropout: float = option(0.0, "dropout of what is added, in training; never taken from `path`")
    scaling: float = option(0.0, "factor of what is added; 0: 1")
    layers: list[str] = option([], "numbers of the blocks that are adapted, such as `0`, `4-15`; empty: all")
    path: str = option("", "folder of a saved bottleneck adapter to go on from; empty: a new one")
