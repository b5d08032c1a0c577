"""The layout of fully sharded data parallelism (torch FSDP2): a block's parameters whole only while it computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from loomtune.contracts.sharding import Region
from loomtune.toolkit.network import Network
from loomtune_plugins.shardings.collectives import joined
from loomtune_plugins.shardings.engine import Layout
from loomtune_plugins.shardings.meshes import Regrouping
from loomtune_plugins.shardings.norms import agree
from loomtune_plugins.shardings.settings import FSDPSettings
from loomtune_plugins.shardings.tensor import cut


class Sharded(Layout):
    """Every parameter cut over the ranks of a shard group, along its first dimension but for few experts.

    mesh: of the dimensions `replicate`, `shard` and `tensor`, the last one's cut coming first; `shard` is always there.
    """

    autocasts = False

    def __init__(self, settings: FSDPSettings, mesh: DeviceMesh, precision: str, regrouping: Regrouping) -> None:
        self.settings, self.mesh, self.precision, self.regrouping = settings, mesh, precision, regrouping
        self.network: Network | None = None

    def shard(self, network: Network) -> None:
        self.network = network
        if "tensor" in self._names:
            cut(network, self.mesh["tensor"])
        blocks = network.spec.model.blocks(network.base)
        frozen = network.spec.optimizer is None  # nothing is kept for a backward pass that never comes
        with self.regrouping.shared():
            for block in blocks:
                self._fully_shard(block, frozen or self.settings.reshard)
        # Used last in forward and first in backward, the root's parameters stay.
        self._fully_shard(network, frozen)
        for module in self._sharded():
            module.set_gradient_divide_factor(1.0)  # sums: the loss is already divided by the global weight
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
            # Sums are kept flat until copies exchange them: with what a micro-batch leaves out, all are of one layout.
            module.set_reduce_scatter_unused_params("replicate" in self._names)
        self._prefetch(network, blocks)

    def _sharded(self) -> list[FSDPModule]:
        modules = self.network.modules() if self.network is not None else ()
        return [module for module in modules if isinstance(module, FSDPModule)]

    def _prefetch(self, network: Any, blocks: Sequence[Any]) -> None:
        ahead = self.settings.prefetch
        if ahead:  # without, torch gathers the next block while one computes, as far as its streams let it
            network.set_modules_to_forward_prefetch(blocks[:ahead])
            for i, block in enumerate(blocks):
                block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + ahead])
                block.set_modules_to_backward_prefetch(blocks[max(i - ahead, 0) : i][::-1])

    @property
    def _names(self) -> tuple[str, ...]:
        names = self.mesh.mesh_dim_names
        assert names is not None, "dimensions are known by their names"
        return names

    def _fully_shard(self, module: nn.Module, reshard: bool | int) -> None:
        compute = torch.bfloat16 if self.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
        on_gpu = self.mesh.device_type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self.settings.offload else OffloadPolicy()
        mesh = self.mesh[tuple(name for name in self._names if name != "tensor")]
        how: Any = {"reshard_after_forward": reshard, "mp_policy": policy, "offload_policy": offload}
        fully_shard(module, mesh=mesh, shard_placement_fn=self._cut, **how)

    def _cut(self, parameter: nn.Parameter) -> Shard | None:
        """Where a parameter is cut: along its first dimension (None), but for experts, whose first is their number.

        Eight experts over 32 ranks would lie on eight of them. torch cuts other dimensions into equal parts alone.
        """
        ranks = self.mesh["shard"].size()
        if parameter.ndim < 3 or parameter.shape[0] >= ranks:
            return None
        return next((Shard(dim) for dim in range(1, parameter.ndim) if parameter.shape[dim] % ranks == 0), None)

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
        if not isinstance(tensor, DTensor):
            return tensor
        mesh, whole = tensor.device_mesh, tensor.to_local()
        cuts = {i: place.dim for i, place in enumerate(tensor.placements) if isinstance(place, Shard | _StridedShard)}
        for i, dim in cuts.items():  # the last dimension of the mesh made the first cut
            before = math.prod(mesh.size(other) for other in cuts if other > i and cuts[other] == dim)
            whole = joined(whole, dim, tensor.shape[dim] // before, mesh.get_group(i))
        return whole

    def settle(self) -> None:
        for module in self._sharded():  # each by itself: `reshard` leaves the modules inside as they are
            module.reshard()

    def agree(self, gradients: Iterable[Tensor]) -> None:
        if "tensor" in self._names:
            agree(gradients, self.mesh["tensor"])

    def home(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self.settings.offload else device

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        assert self.network is not None
        reduce = last or self.settings.accumulate_sharded
        self.network.set_requires_gradient_sync(reduce)  # type: ignore[operator]
        self.network.set_requires_all_reduce(last)  # type: ignore[operator] # copies need the sum of all alone
        self.network.set_is_last_backward(last)  # type: ignore[operator]
        yield

    def answers_for(self, parameter: nn.Parameter, index: int, sizes: list[int]) -> bool:
        """Of several copies of a part, the first one's rank writes."""
        assert isinstance(parameter, DTensor)
        placed = dict(zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True))
        copied = [name for name in self._names if name not in placed or placed[name].is_replicate()]
        return all(self.mesh.get_local_rank(name) == 0 for name in copied)

    @property
    def whole(self) -> bool:
        return False


class _Chunks:
    """What `torch.chunk` would give, with empty ones up to `count`, each made when it is asked for."""

    def __init__(self, tensor: Tensor, count: int, dim: int) -> None:
        self._tensor, self._count, self._dim = tensor, count, dim

    def __getitem__(self, index: int) -> Tensor:
        size = self._tensor.shape[self._dim]
        each = -(-size // self._count)
        start = index * each
        if start >= size:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(each, size - start))


@contextmanager
def cut_alone() -> Iterator[None]:
    """Within it fully_shard (torch 2.13) makes views of this rank's part alone: of 512 ranks, those of all others take
    a rehearsal longer than its step."""
    owner: Any = _fsdp_param
    before, owner._chunk_with_empty = owner._chunk_with_empty, _Chunks
    try:
        yield
    finally:
        owner._chunk_with_empty = before
