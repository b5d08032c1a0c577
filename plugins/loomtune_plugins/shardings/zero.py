"""ZeRO (DeepSpeed): optimizer state, gradients and parameters in parts over the ranks."""

from __future__ import annotations

from ctypes.util import find_library
from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec, Model, Sharding
from loomtune.errors import Fault, UserError
from loomtune_plugins.shardings.grid import Grid
from loomtune_plugins.shardings.settings import ZeroSettings

if TYPE_CHECKING:
    import torch.distributed as dist

    from loomtune.world import World

OFFLOADS = ("none", "optimizer", "all")


class Zero(Sharding):
    """Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".

    DeepSpeed is imported when the first engine is built, not before.
    """

    def __init__(self, settings: ZeroSettings) -> None:
        self.settings = settings
        self._sequence: dist.ProcessGroup | None = None

    def check(self, world_size: int) -> None:
        if faults := _faults(self.settings):
            raise UserError(*faults)
        self._grid(world_size)

    def suits(self, model: Model) -> None:
        if self.settings.sequence > 1:
            model.check_sequence(self.settings.sequence)

    def replicas(self, world: World) -> tuple[int, int]:
        return self._grid(world.size).replica(world.rank)

    def _grid(self, world_size: int) -> Grid:
        return Grid.of(world_size, sequence=self.settings.sequence)

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.meshes import sequence_group
        from loomtune_plugins.shardings.zero_engine import ZeroEngine

        if self._sequence is None:  # one for all roles
            self._sequence = sequence_group(self._grid(world.size), world.device.type)
        return ZeroEngine(spec, world, self.settings, self._sequence)


def _faults(settings: ZeroSettings) -> list[Fault]:
    stage, offload = settings.stage, settings.offload
    faults = []
    if stage == 0:
        what = "sharding.stage=0 partitions nothing, and in bf16 DeepSpeed's Adam takes one step too many there"
        faults.append(Fault(what, "set sharding.stage to 1, 2 or 3, or sharding=ddp"))
    elif stage not in (1, 2, 3):
        faults.append(Fault(f"ZeRO has no stage {stage}", "set sharding.stage to 1, 2 or 3"))
    if offload not in OFFLOADS:
        faults.append(Fault(f"there is no offload '{offload}'", f"set sharding.offload to {', '.join(OFFLOADS)}"))
    if offload == "all" and stage != 3:
        what = f"sharding.offload=all moves parameters, which stage {stage} keeps whole on every rank"
        faults.append(Fault(what, "set sharding.stage=3, or sharding.offload=optimizer"))
    if settings.bucket_mb < 1:
        faults.append(Fault(f"sharding.bucket_mb={settings.bucket_mb} holds nothing", "set sharding.bucket_mb=100"))
    return faults + _nvme_faults(settings)


def _nvme_faults(settings: ZeroSettings) -> list[Fault]:
    if not settings.nvme:
        return []
    if settings.stage != 3 or settings.offload == "none":
        what = "sharding.nvme says where offloaded state lies, and only stage 3 can offload so far"
        return [Fault(what, "set sharding.stage=3 sharding.offload=optimizer, or leave sharding.nvme out")]
    if find_library("aio") is None:
        what = f"sharding.nvme={settings.nvme} needs libaio, which is not installed here"
        return [Fault(what, "install libaio with its headers (Debian: libaio-dev) on every node, or leave it out")]
    return []
