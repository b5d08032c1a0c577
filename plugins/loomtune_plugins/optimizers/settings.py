"""Settings of the optimizers."""

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option

DECAY_TO = "where decay leads: zero; start, the weights that training began with (L2-SP), at the price of a copy"


@dataclass
class AdamWSettings:
    """AdamW. The rate suits full fine-tuning of a pretrained model; adapters take ten times as much."""

    lr: float = option(2e-5, "peak learning rate, which the schedule scales")
    beta1: float = option(0.9, "decay of the mean of gradients")
    beta2: float = option(0.999, "decay of the mean of squared gradients; long pretraining uses 0.95")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(
        0.01, "decoupled decay of weight matrices (torch's default); 0.1 is usual for long runs"
    )
    decay_to: str = option("zero", DECAY_TO)
    clip: float = option(1.0, "largest global gradient norm; 0: none")
    fused: Optional[bool] = option(None, "torch's fused kernel; null: where every parameter's device has it")  # noqa: UP045


@dataclass
class SGDSettings:
    """Gradient descent."""

    lr: float = option(1e-2, "peak learning rate, which the schedule scales")
    momentum: float = option(0.0, "factor of the velocity that stays from step to step; 0: none is kept")
    nesterov: bool = option(False, "look ahead along the velocity")
    weight_decay: float = option(0.0, "L2 penalty on weight matrices, added to their gradients")
    decay_to: str = option("zero", DECAY_TO)
    clip: float = option(1.0, "largest global gradient norm; 0: none")
