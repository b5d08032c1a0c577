"""Device meshes and groups of the grid. Collective: every rank makes the same ones in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard as torchs

from loomtune_plugins.shardings.grid import Grid


def parameter_mesh(grid: Grid, device: str) -> DeviceMesh:
    """Over which parameters lie: `shard`, which sequence ranks are part of, and `replicate` and `tensor` where set."""
    sizes = {"replicate": grid.replicate, "shard": grid.shard * grid.sequence, "tensor": grid.tensor}
    used = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return _mesh(device, used)


def sequence_group(grid: Grid, device: str) -> dist.ProcessGroup | None:
    """The ranks that share this one's rows, each with its stretch of positions; None where there is one."""
    if grid.sequence == 1:
        return None
    sizes = {"rows": grid.replicate * grid.shard, "sequence": grid.sequence, "tensor": grid.tensor}
    return _mesh(device, sizes).get_group("sequence")


def _mesh(device: str, sizes: dict[str, int]) -> DeviceMesh:
    """Made of numbers also in a rehearsal, where other tensors have none: it looks at them."""
    with unset_fake_temporarily():
        return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


MAKER = "_get_post_forward_mesh_info"


class Regrouping:
    """The smaller groups over which parameters stay sharded between forward and backward pass, one set for all blocks.

    torch (2.13, `MAKER`) makes a mesh and its process groups anew for every module: two for each
    of 80 blocks, each of which may become a communicator with buffers of its own. No argument hands one over.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, DeviceMesh], Any] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it fully_shard takes the groups of the blocks before."""
        make: Any = vars(torchs)[MAKER]

        def once(reshard: bool | int, info: Any) -> Any:
            if isinstance(reshard, bool):
                return make(reshard, info)
            known = reshard, info.mesh
            if known not in self._made:
                self._made[known] = make(reshard, info)
            return self._made[known]

        setattr(torchs, MAKER, once)
        try:
            yield
        finally:
            setattr(torchs, MAKER, make)
