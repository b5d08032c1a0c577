"""Settings of QLoRA; imports nothing heavy."""

from dataclasses import dataclass

from loomtune.settings import option
from loomtune_plugins.adapters.settings import LoraSettings


@dataclass
class QloraSettings(LoraSettings):
    """LoRA on linear layers that are kept in 4 bits. Everything of `adapter=lora` and how the base is kept."""

    quant: str = option("nf4", "the 16 values of a weight: `nf4` (normal), or `fp4`")
    double_quant: bool = option(True, "keep the scales of blocks in 8 bits, which saves 0.37 bits a weight")
    block: int = option(64, "weights of a row that share a scale; the fewer, the closer to the base")
    keep: list[str] = option([], "linear layers that stay as they are: names, or patterns such as `layers.0.*`")
