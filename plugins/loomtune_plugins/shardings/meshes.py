"""Device meshes and groups of the grid. Collective: every rank makes the same ones in the same order."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from loomtune_plugins.shardings.grid import Grid


def parameter_mesh(grid: Grid, device: str) -> DeviceMesh:
    """Over which parameters lie: `shard`, which sequence ranks are part of, and `replicate` and `tensor` where set."""
    sizes = {"replicate": grid.replicate, "shard": grid.shard * grid.sequence, "tensor": grid.tensor}
    used = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device, tuple(used.values()), mesh_dim_names=tuple(used))


def sequence_group(grid: Grid, device: str) -> dist.ProcessGroup | None:
    """The ranks that share this one's rows, each with its stretch of positions; None where there is one."""
    if grid.sequence == 1:
        return None
    sizes = (grid.replicate * grid.shard, grid.sequence, grid.tensor)
    return init_device_mesh(device, sizes, mesh_dim_names=("rows", "sequence", "tensor")).get_group("sequence")
