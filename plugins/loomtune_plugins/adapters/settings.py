"""Settings of the adapters."""

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option


@dataclass
class FullSettings:
    """The model's own weights."""

    freeze: list[str] = option(
        [], "parameters or modules that stay as they are: names, or patterns such as `model.layers.0-15`, `*embed*`"
    )


@dataclass
class LoraSettings:
    """Low-rank adaptation. Usual learning rates are about ten times those of full fine-tuning.

    What is null is as the adapter in `path` has it, or has the default that is named here.
    """

    rank: int | None = option(None, "inner dimension of the addition B A; default 16")
    alpha: float | None = option(None, "the addition is scaled by alpha / rank; default 32")
    dropout: float | None = option(None, "dropout of the addition's input; default 0")
    targets: list[str] | None = option(
        None,
        "linear layers: `all-linear` (the default: all but the output head), names such as `q_proj`, or patterns "
        "such as `*.mlp.*` and `layers.4-15.*`",
    )
    rslora: bool | None = option(
        None, "scale by alpha / sqrt(rank) instead, which keeps high ranks learning; default false"
    )
    dora: bool | None = option(
        None, "train the length of each output row apart from its direction; slower; default false"
    )
    plus_ratio: float = option(1.0, "LoRA+: learning rate of B over that of A; its authors take 16")
    init: str | None = option(
        None,
        "first values: `kaiming` (the default) or `gaussian` (A; B is zero), `orthogonal`, or of the base's own "
        "matrices: `pissa` (an exact SVD of each matrix in fp64, at each start on each rank), "
        "`pissa_niter_N` (nearly the same in N iterations, such as 4: for large models), `olora` (its QR)",
    )
    modules: list[str] = option([], "modules that are trained whole beside it: `lm_head`, `embed_tokens`, `*norm`")
    tokens: list[Union[int, str]] = option(  # noqa: UP007 (OmegaConf reads no other)
        [], "rows of the embedding that are trained beside it: token ids, or tokens as they are written"
    )
    path: str = option("", "folder of an adapter in peft's format with which the training goes on")
    under: list[str] = option([], "folders of adapters in peft's format that stay active and frozen beneath this one")
