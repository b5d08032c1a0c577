"""Settings of the shardings: what changes memory and time, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from loomtune.settings import option

SEQUENCE = "ranks that share each row, a stretch of positions each (Ulysses)"


@dataclass
class SingleSettings:
    """One process."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")


@dataclass
class DDPSettings:
    """Replicas."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")
    bucket_mb: int = option(25, "size of the buckets in which gradients are reduced while others are still computed")
    sequence: int = option(1, SEQUENCE)


@dataclass
class FSDPSettings:
    """Fully sharded data parallelism."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")
    replicate: int = option(
        1, "copies of the sharded whole (HSDP): shards stay inside a group of world/replicate ranks"
    )
    sequence: int = option(1, SEQUENCE)
    tensor: int = option(1, "ranks over which each layer is cut, by the model's own plan; keep them inside one node")
    reshard: Union[bool, int] = option(  # noqa: UP007 - OmegaConf's structured configs know only this form
        True,
        "free a block's gathered parameters after its forward pass, and gather them again; a number keeps them sharded "
        "over groups of so many ranks in between",
    )
    prefetch: int = option(0, "blocks whose parameters are gathered ahead while one computes; 0 leaves it to torch")
    offload: bool = option(False, "keep parameters, gradients and optimizer state in host memory between uses")
    accumulate_sharded: bool = option(
        True, "reduce gradients after every micro-batch; false keeps whole ones until the last: less communication"
    )


@dataclass
class ZeroSettings:
    """ZeRO by DeepSpeed."""

    activation_checkpointing: bool = option(False, "compute each block's activations again in the backward pass")
    stage: int = option(3, "what is kept in parts: 1 optimizer state, 2 also gradients, 3 also parameters")
    offload: str = option("none", "what lies in host memory between uses: none, optimizer, or all (stage 3)")
    nvme: str = option("", "a folder on a local disk, into which stage 3 offloads instead of host memory")
    bucket_mb: int = option(100, "size of the buckets in which gradients are reduced and parameters gathered ahead")
    sequence: int = option(1, SEQUENCE)
    persist: int = option(100_000, "stage 3: parameters of at most so many numbers stay whole on every rank")
