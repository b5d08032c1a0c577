"""How networks are laid out over processes."""

from __future__ import annotations

from loomtune import hookimpl
from loomtune.contracts import Sharding
from loomtune.offers import Offer, Trait
from loomtune_plugins.shardings.rules import preflight
from loomtune_plugins.shardings.settings import DDPSettings, FSDPSettings, SingleSettings, ZeroSettings

__all__ = ["preflight", "shardings"]


@hookimpl
def shardings() -> list[Offer[Sharding]]:
    return [
        Offer(
            name="single",
            build="loomtune_plugins.shardings.single:Single",
            schema=SingleSettings,
            summary="one process, nothing sharded",
        ),
        Offer(
            name="ddp",
            build="loomtune_plugins.shardings.ddp:DDP",
            schema=DDPSettings,
            summary="every process holds everything; gradients are summed (torch DDP)",
            provides=frozenset({Trait.MANY_PROCESSES}),
            variants={"sequence": ("sharding.sequence=2",)},
        ),
        Offer(
            name="fsdp",
            build="loomtune_plugins.shardings.fsdp:FSDP",
            schema=FSDPSettings,
            summary="parameters, gradients and optimizer state sharded by block (torch FSDP2, HSDP)",
            provides=frozenset({Trait.MANY_PROCESSES}),
            variants={
                "hsdp": ("sharding.replicate=2",),
                "offload": ("sharding.offload=true",),
                "tensor": ("sharding.tensor=2",),
                "sequence": ("sharding.sequence=2",),
            },
        ),
        Offer(
            name="zero",
            build="loomtune_plugins.shardings.zero:Zero",
            schema=ZeroSettings,
            summary="optimizer state, gradients and parameters in parts (DeepSpeed ZeRO stages 1 to 3), with offload",
            provides=frozenset({Trait.MANY_PROCESSES}),
            excludes={Trait.SHAPED_UPDATES: "DeepSpeed's optimizer sees flat parts of parameters, without shapes"},
            variants={
                "stage 1": ("sharding.stage=1",),
                "stage 2": ("sharding.stage=2",),
                "stage 3": ("sharding.stage=3",),
                "offload": ("sharding.offload=all",),
                "sequence": ("sharding.sequence=2",),
            },
        ),
    ]
