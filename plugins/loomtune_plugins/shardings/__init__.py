"""How networks are laid out over processes."""

from __future__ import annotations

from loomtune import hookimpl
from loomtune.contracts import Sharding
from loomtune.offers import Offer, Trait
from loomtune_plugins.shardings.settings import DDPSettings, FSDPSettings, SingleSettings


@hookimpl
def shardings() -> list[Offer[Sharding]]:
    return [
        Offer(
            name="single",
            build="loomtune_plugins.shardings.single:Single",
            schema=SingleSettings,
            summary="one process, nothing sharded",
            provides=frozenset({Trait.STREAMED_BIRTH}),
        ),
        Offer(
            name="ddp",
            build="loomtune_plugins.shardings.ddp:DDP",
            schema=DDPSettings,
            summary="every process holds everything; gradients are summed (torch DDP)",
            provides=frozenset({Trait.STREAMED_BIRTH, Trait.MANY_PROCESSES}),
        ),
        Offer(
            name="fsdp",
            build="loomtune_plugins.shardings.fsdp:FSDP",
            schema=FSDPSettings,
            summary="parameters, gradients and optimizer state sharded by block (torch FSDP2, HSDP)",
            provides=frozenset({Trait.STREAMED_BIRTH, Trait.MANY_PROCESSES, Trait.SHARDED_WEIGHTS}),
        ),
    ]
