"""Distributed data parallelism: replicas whose gradients are summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec, Model, Sharding
from loomtune_plugins.shardings.grid import Grid
from loomtune_plugins.shardings.settings import DDPSettings

if TYPE_CHECKING:
    import torch.distributed as dist

    from loomtune.world import World


class DDP(Sharding):
    """torch's DistributedDataParallel."""

    def __init__(self, settings: DDPSettings) -> None:
        self.settings = settings
        self._sequence: dist.ProcessGroup | None = None

    def check(self, world_size: int) -> None:
        self._grid(world_size)

    def suits(self, model: Model) -> None:
        if self.settings.sequence > 1:
            model.check_sequence(self.settings.sequence)

    def replicas(self, world: World) -> tuple[int, int]:
        return self._grid(world.size).replica(world.rank)

    def _grid(self, world_size: int) -> Grid:
        return Grid.of(world_size, sequence=self.settings.sequence)

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.engine import TorchEngine
        from loomtune_plugins.shardings.meshes import sequence_group
        from loomtune_plugins.shardings.replicated import Replicated

        if self._sequence is None:  # one for all roles
            self._sequence = sequence_group(self._grid(world.size), world.device.type)
        layout, recompute = Replicated(world, self.settings.bucket_mb), self.settings.activation_checkpointing
        return TorchEngine(spec, world, layout, recompute=recompute, sequence=self._sequence)
