"""Settings of AdamW with small or paged state; imports nothing heavy."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class AdamW8bitSettings:
    """AdamW with moments of 8 bits, or with moments that lie in host memory while the device is short of its own."""

    lr: float = option(2e-5, "peak learning rate, which the schedule scales")
    beta1: float = option(0.9, "decay of the mean of gradients")
    beta2: float = option(0.999, "decay of the mean of squared gradients; long pretraining uses 0.95")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.01, "decoupled decay of weight matrices; 0.1 is usual for long runs")
    clip: float = option(1.0, "largest global gradient norm; 0: none")
    bits: int = option(8, "of each moment: 8, or 32; parameters of fewer than 4,096 numbers keep 32")
    paged: bool = option(False, "let moments move to host memory where the device has no room left; GPUs only")
