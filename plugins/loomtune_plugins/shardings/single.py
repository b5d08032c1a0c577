"""One process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from loomtune.contracts import Engine, EngineSpec, Sharding
from loomtune.errors import UserError
from loomtune.toolkit.network import Network
from loomtune.world import World
from loomtune_plugins.shardings.engine import Layout, Region, TorchEngine
from loomtune_plugins.shardings.settings import SingleSettings


class Whole(Layout):
    """Everything on this rank."""

    def shard(self, network: Network) -> None:
        return None

    def wrap(self, network: Network) -> nn.Module:
        return network

    def region(self, parameter: nn.Parameter) -> Region:
        return tuple(slice(0, size) for size in parameter.shape)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def full(self, tensor: Tensor) -> Tensor:
        return tensor

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def answers_for(self, index: int, sizes: list[int]) -> bool:
        return True

    @property
    def whole(self) -> bool:
        return True


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
        return TorchEngine(spec, world, Whole(), recompute=self.settings.activation_checkpointing)
