"""The layout of one process: everything on this rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from loomtune.toolkit.network import Network
from loomtune_plugins.shardings.engine import Layout, Region


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

    def answers_for(self, parameter: nn.Parameter, index: int, sizes: list[int]) -> bool:
        return True

    @property
    def whole(self) -> bool:
        return True
