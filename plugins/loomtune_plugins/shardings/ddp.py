"""Distributed data parallelism: replicas whose gradients are summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec
from loomtune.errors import UserError
from loomtune_plugins.shardings.gridded import Gridded, bucket_faults
from loomtune_plugins.shardings.settings import DDPSettings

if TYPE_CHECKING:
    from loomtune.world import World


class DDP(Gridded):
    """torch's DistributedDataParallel."""

    def __init__(self, settings: DDPSettings) -> None:
        super().__init__(sequence=settings.sequence)
        self.settings = settings

    def check(self, world_size: int) -> None:
        if faults := bucket_faults(self.settings.bucket_mb):
            raise UserError(*faults)
        super().check(world_size)

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.engine import TorchEngine
        from loomtune_plugins.shardings.replicated import Replicated

        layout, recompute = Replicated(world, self.settings.bucket_mb), self.settings.activation_checkpointing
        return TorchEngine(spec, world, layout, recompute=recompute, sequence=self.sequence_group(world))

    def rehearsed(self, spec: EngineSpec, world: World, kind: str = "") -> Engine:
        """The engine itself, whose buckets stay as they were laid at first."""
        from loomtune_plugins.shardings.replicated import keep_buckets

        engine = self.engine(spec, world)
        keep_buckets(engine.layout)  # type: ignore[attr-defined]
        return engine
