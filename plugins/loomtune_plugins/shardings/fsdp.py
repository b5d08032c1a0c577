"""Fully sharded data parallelism (torch FSDP2), with tensor parallelism inside its shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec
from loomtune.errors import UserError
from loomtune_plugins.shardings.gridded import Gridded
from loomtune_plugins.shardings.settings import FSDPSettings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from loomtune.world import World
    from loomtune_plugins.shardings.meshes import Regrouping


class FSDP(Gridded):
    """torch's fully_shard, by the model's own blocks; with `replicate` copies it is HSDP."""

    def __init__(self, settings: FSDPSettings) -> None:
        super().__init__(replicate=settings.replicate, sequence=settings.sequence, tensor=settings.tensor)
        self.settings = settings
        self._mesh: DeviceMesh | None = None
        self._regrouping: Regrouping | None = None

    def check(self, world_size: int) -> None:
        grid = self.grid(world_size)
        if self.settings.prefetch < 0:
            raise UserError.of(f"sharding.prefetch={self.settings.prefetch} is less than 0", "set sharding.prefetch=0")
        if world_size and not isinstance(self.settings.reshard, bool):
            self._check_regrouping(self.settings.reshard, grid.shard * grid.sequence)

    def _check_regrouping(self, group: int, sharers: int) -> None:
        if self.settings.tensor > 1:
            raise UserError.of(
                f"sharding.reshard={group} cannot regroup parameters that sharding.tensor={self.settings.tensor} cuts",
                "set sharding.reshard to true or false",
            )
        if not 1 < group < sharers or sharers % group:
            inner = [n for n in range(2, sharers) if sharers % n == 0]
            nearest = min(inner, key=lambda n: abs(n - group), default="true")
            raise UserError.of(
                f"sharding.reshard={group} is no group within the {sharers} ranks that share the parameters",
                f"set sharding.reshard={nearest}",
            )

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.engine import TorchEngine
        from loomtune_plugins.shardings.meshes import Regrouping, parameter_mesh
        from loomtune_plugins.shardings.sharded import Sharded

        if self._mesh is None:  # one for all roles: each new mesh makes process groups
            self._mesh = parameter_mesh(self.grid(world.size), world.device.type)
            self._regrouping = Regrouping()
        assert self._regrouping is not None
        layout = Sharded(self.settings, self._mesh, spec.precision, self._regrouping)
        recompute = self.settings.activation_checkpointing
        return TorchEngine(spec, world, layout, recompute=recompute, sequence=self.sequence_group(world))

    def rehearsed(self, spec: EngineSpec, world: World, kind: str = "") -> Engine:
        """The engine itself, of which only this rank's part is cut out of each parameter, not those of all ranks."""
        from loomtune_plugins.shardings.sharded import cut_alone

        with cut_alone():
            return self.engine(spec, world)
