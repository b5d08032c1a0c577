"""Distributed data parallelism: replicas whose gradients are summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec, Sharding
from loomtune_plugins.shardings.settings import DDPSettings

if TYPE_CHECKING:
    from loomtune.world import World


class DDP(Sharding):
    """torch's DistributedDataParallel."""

    def __init__(self, settings: DDPSettings) -> None:
        self.settings = settings

    def check(self, world_size: int) -> None:
        return None

    def replicas(self, world: World) -> tuple[int, int]:
        return world.rank, world.size

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.engine import TorchEngine
        from loomtune_plugins.shardings.replicated import Replicated

        layout = Replicated(world, self.settings.bucket_mb)
        return TorchEngine(spec, world, layout, recompute=self.settings.activation_checkpointing)
