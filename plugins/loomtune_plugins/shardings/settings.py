"""Settings of the shardings: what changes memory and time, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class SingleSettings:
    """One process."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")


@dataclass
class DDPSettings:
    """Replicas."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")
    bucket_mb: int = option(25, "size of the buckets in which gradients are reduced while others are still computed")


@dataclass
class FSDPSettings:
    """Fully sharded data parallelism."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")
    replicate: int = option(
        1, "copies of the sharded whole (HSDP): shards stay inside a group of world/replicate ranks"
    )
    reshard: bool = option(True, "free a block's gathered parameters after its forward pass, and gather them again")
    offload: bool = option(False, "keep parameters, gradients and optimizer state in host memory between uses")
    accumulate_sharded: bool = option(
        False, "reduce gradients after every micro-batch: less memory, more communication"
    )
