"""ZeRO (DeepSpeed): optimizer state, gradients and parameters in parts over the ranks."""

from __future__ import annotations

from ctypes.util import find_library
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec
from loomtune.errors import Fault, UserError
from loomtune_plugins.shardings.gridded import Gridded, bucket_faults
from loomtune_plugins.shardings.settings import ZeroSettings

if TYPE_CHECKING:
    from loomtune.world import World

OFFLOADS = ("none", "optimizer", "all")


class Zero(Gridded):
    """Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".

    DeepSpeed is imported when the first engine is built, not before.
    """

    def __init__(self, settings: ZeroSettings) -> None:
        super().__init__(sequence=settings.sequence)
        self.settings = settings

    def check(self, world_size: int) -> None:
        if faults := _faults(self.settings):
            raise UserError(*faults)
        super().check(world_size)

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.zero_engine import ZeroEngine

        if self.settings.nvme:
            _make(Path(self.settings.nvme))
        return ZeroEngine(spec, world, self.settings, self.sequence_group(world))

    def rehearsed(self, spec: EngineSpec, world: World, kind: str = "") -> Engine:
        from loomtune_plugins.shardings.zero_rehearsal import RehearsedZero

        return RehearsedZero(spec, world, self.settings, self.sequence_group(world), kind)


def _make(disk: Path) -> None:
    """The folder of swapped state, on each node; DeepSpeed would fail in its own words."""
    try:
        disk.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cure = "set sharding.nvme to a folder of a local disk that every node has"
        raise UserError.of(f"sharding.nvme={disk} cannot be made here: {error}", cure) from error


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
    return [*faults, *bucket_faults(settings.bucket_mb), *_persist_faults(settings), *_nvme_faults(settings)]


def _persist_faults(settings: ZeroSettings) -> list[Fault]:
    if settings.persist < 0:
        return [Fault(f"sharding.persist={settings.persist} is less than 0", "set sharding.persist=0")]
    if settings.stage != 3 and settings.persist != ZeroSettings().persist:
        what = f"sharding.persist has no effect in stage {settings.stage}, which keeps all parameters whole"
        return [Fault(what, "leave it out, or set sharding.stage=3")]
    return []


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
