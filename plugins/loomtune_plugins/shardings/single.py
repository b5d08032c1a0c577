"""One process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.contracts import Engine, EngineSpec, Sharding
from loomtune.errors import UserError
from loomtune_plugins.shardings.settings import SingleSettings

if TYPE_CHECKING:
    from loomtune.world import World


class Single(Sharding):
    """The null object among the strategies."""

    def __init__(self, settings: SingleSettings) -> None:
        self.settings = settings

    def check(self, world_size: int) -> None:
        if world_size > 1:
            raise UserError.of(
                f"sharding=single runs on one process, not on {world_size}",
                "set sharding=ddp or sharding=fsdp, or launcher.procs=1",
            )

    def replicas(self, world: World) -> tuple[int, int]:
        return 0, 1

    def engine(self, spec: EngineSpec, world: World) -> Engine:
        from loomtune_plugins.shardings.engine import TorchEngine
        from loomtune_plugins.shardings.whole import Whole

        return TorchEngine(spec, world, Whole(), recompute=self.settings.activation_checkpointing)
