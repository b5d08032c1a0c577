"""What the strategies that cut rows or layers over ranks have in common: their ranks form a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Model, Sharding
from loomtune.errors import Fault
from loomtune_plugins.shardings.grid import Grid

if TYPE_CHECKING:
    import torch.distributed as dist

    from loomtune.world import World


class Gridded(Sharding):
    """A strategy whose settings say how the ranks are numbered; see `Grid`."""

    def __init__(self, *, replicate: int = 1, sequence: int = 1, tensor: int = 1) -> None:
        self._cuts = {"replicate": replicate, "sequence": sequence, "tensor": tensor}
        self._rows: dist.ProcessGroup | None = None

    def check(self, world_size: int) -> None:
        self.grid(world_size)

    def suits(self, model: Model) -> None:
        if (tensor := self._cuts["tensor"]) > 1:
            model.check_tensor(tensor)
        if (sequence := self._cuts["sequence"]) > 1:
            model.check_sequence(sequence, tensor)

    def replicas(self, world: World) -> tuple[int, int]:
        return self.grid(world.size).replica(world.rank)

    def grid(self, world_size: int) -> Grid:
        """The grid of a world. Raises UserError where it cannot be divided so."""
        return Grid.of(world_size, **self._cuts)

    def sequence_group(self, world: World) -> dist.ProcessGroup | None:
        """The ranks that share this one's rows, one group for all roles. Collective where it is made."""
        from loomtune_plugins.shardings.meshes import sequence_group

        if self._rows is None:
            self._rows = sequence_group(self.grid(world.size), world.device.type)
        return self._rows


def bucket_faults(bucket_mb: int) -> list[Fault]:
    """What is wrong with the size of buckets, which torch and DeepSpeed would take as it is."""
    if bucket_mb >= 1:
        return []
    return [Fault(f"sharding.bucket_mb={bucket_mb} holds nothing", "set sharding.bucket_mb to at least 1")]
