"""Settings of the adapters."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class FullSettings:
    """The model's own weights."""

    freeze: list[str] = option(
        [], "parameters or modules that stay as they are: names, or patterns such as `model.layers.0-15`, `*embed*`"
    )


@dataclass
class LoraSettings:
    """Low-rank adaptation. Usual learning rates are about ten times those of full fine-tuning."""

    rank: int = option(16, "inner dimension of the addition B A")
    alpha: int = option(32, "the addition is scaled by alpha / rank")
    dropout: float = option(0.0, "dropout of the addition's input")
    targets: list[str] = option(
        ["all-linear"],
        "linear layers: `all-linear` (all but the output head), names such as `q_proj`, or patterns such as `*.mlp.*`",
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead, which keeps high ranks learning")
    dora: bool = option(False, "train the length of each output row apart from its direction; slower")
    plus_ratio: float = option(1.0, "LoRA+: learning rate of B over that of A; its authors take 16")
