"""The layout of fully sharded data parallelism (torch FSDP2): a block's parameters whole only while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from loomtune.toolkit.network import Network
from loomtune_plugins.shardings.engine import Layout, Region
from loomtune_plugins.shardings.settings import FSDPSettings


class Sharded(Layout):
    """Every parameter cut along its first dimension over the ranks of a shard group."""

    autocasts = False

    def __init__(self, settings: FSDPSettings, mesh: DeviceMesh, precision: str) -> None:
        self.settings, self.mesh, self.precision = settings, mesh, precision
        self.network: Network | None = None

    def shard(self, network: Network) -> None:
        self.network = network
        model = network.spec.model
        for block in model.blocks(network.base):
            self._fully_shard(block, self.settings.reshard)
        # Used last in forward and first in backward, the root's parameters stay, unless there is no backward.
        self._fully_shard(network, network.spec.optimizer is None)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums: the loss is already divided by the global weight
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction

    def _fully_shard(self, module: nn.Module, reshard: bool) -> None:
        compute = torch.bfloat16 if self.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
        on_gpu = self.mesh.device_type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self.settings.offload else OffloadPolicy()
        fully_shard(module, mesh=self.mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)

    def wrap(self, network: Network) -> nn.Module:
        return network

    def region(self, parameter: nn.Parameter) -> Region:
        assert isinstance(parameter, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def settle(self) -> None:
        if self.network is not None:
            self.network.reshard()  # type: ignore[operator]

    def home(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self.settings.offload else device

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        assert self.network is not None
        reduce = last or self.settings.accumulate_sharded
        self.network.set_requires_gradient_sync(reduce)  # type: ignore[operator]
        self.network.set_is_last_backward(last)  # type: ignore[operator]
        yield

    def answers_for(self, index: int, sizes: list[int]) -> bool:
        """Of several copies of a shard, the first copy's ranks write."""
        return self.settings.replicate == 1 or self.mesh.get_local_rank("replicate") == 0

    @property
    def whole(self) -> bool:
        return False
