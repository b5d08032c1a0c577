"""The layout of distributed data parallelism: everything on every rank, gradients summed."""

# No postponed annotations here: DDP reads those of a communication hook and wants the classes themselves.

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loomtune.toolkit.network import Network
from loomtune.world import World
from loomtune_plugins.shardings.engine import Layout, Region


class Replicated(Layout):
    """Everything on every rank."""

    def __init__(self, world: World, bucket_mb: int) -> None:
        self.world, self.bucket_mb = world, bucket_mb
        self.ddp: DistributedDataParallel | None = None

    def shard(self, network: Network) -> None:
        return None

    def wrap(self, network: Network) -> nn.Module:
        if self.world.size == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        self.ddp = DistributedDataParallel(
            network,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,
            init_sync=False,  # every rank has read the same weights
        )
        self.ddp.register_comm_hook(None, _sum)
        return self.ddp

    def region(self, parameter: nn.Parameter) -> Region:
        return tuple(slice(0, size) for size in parameter.shape)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def full(self, tensor: Tensor) -> Tensor:
        return tensor

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        if last or self.ddp is None:
            return nullcontext()
        return self.ddp.no_sync()

    def answers_for(self, parameter: nn.Parameter, index: int, sizes: list[int]) -> bool:
        """Replicas share the writing: a parameter falls to the rank in whose equal part of the bytes it begins."""
        before, total = sum(sizes[:index]), sum(sizes)
        return before * self.world.size // max(total, 1) == self.world.rank

    @property
    def whole(self) -> bool:
        return True


def _sum(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums gradients over ranks where DDP would average them: the loss is already divided by the global weight."""
    buffer = bucket.buffer()
    future = dist.all_reduce(buffer, async_op=True).get_future()
    return future.then(lambda done: buffer)  # type: ignore[no-any-return]


class _Kept:
    """A reducer that never lays its buckets anew, for which torch (2.13) looks at numbers that a rehearsal lacks.

    The new ones hold the same bytes, in the order in which gradients came.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def keep_buckets(layout: Replicated) -> None:
    """For a rehearsal."""
    if layout.ddp is not None:
        layout.ddp.reducer = _Kept(layout.ddp.reducer)  # type: ignore[assignment]
