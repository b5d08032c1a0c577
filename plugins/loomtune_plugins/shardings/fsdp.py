"""Fully sharded data parallelism (torch FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec, Sharding
from loomtune.errors import UserError
from loomtune_plugins.shardings.settings import FSDPSettings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from loomtune.world import World


class FSDP(Sharding):
    """torch's fully_shard, by the model's own blocks; with `replicate` copies it is HSDP."""

    def __init__(self, settings: FSDPSettings) -> None:
        self.settings = settings

    def check(self, world_size: int) -> None:
        replicate = self.settings.replicate
        if replicate < 1 or world_size % replicate:
            fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
            nearest = min(fits, key=lambda n: abs(n - replicate))
            raise UserError.of(
                f"{world_size} processes cannot be divided into {replicate} copies",
                f"set sharding.replicate={nearest}, or launch a multiple of {max(replicate, 1)} processes",
            )

    def replicas(self, world: World) -> tuple[int, int]:
        return world.rank, world.size

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.engine import TorchEngine
        from loomtune_plugins.shardings.sharded import Sharded

        mesh = self._mesh(world)
        layout = Sharded(self.settings, mesh, spec.precision)
        return TorchEngine(spec, world, layout, recompute=self.settings.activation_checkpointing)

    def _mesh(self, world: World) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        copies, kind = self.settings.replicate, world.device.type
        if copies == 1:
            return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))
