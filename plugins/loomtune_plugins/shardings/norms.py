"""The norm of all gradients together, the same for every layout.

torch's norm of a large fp32 tensor on a CPU adds squares up one after the other: of 12 million numbers it is 5e-4 too
small, of half as many 2e-4 (torch 2.13). So how parameters are cut would decide how gradients are clipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

BLOCK = 1 << 16
"""Numbers whose squares are added up in fp32; sums of blocks are added in float64. Error below 1e-6, at no cost."""


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Norm `()` fp32 over whole and sharded gradients, on every rank. Collective where some are sharded.

    What ranks of a mesh dimension hold in common counts once.
    """
    sums: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            cut = tuple(i for i, place in enumerate(gradient.placements) if not place.is_replicate())
            part = _squares(gradient.to_local()).to(gradient.device_mesh.device_type)
            sums[gradient.device_mesh, cut].append(part)
        else:
            sums[None].append(_squares(gradient))
    totals = []
    for where, parts in sums.items():
        totals.append(total := torch.stack(parts).sum())
        if where is not None:
            for dimension in where[1]:
                dist.all_reduce(total, group=where[0].get_group(dimension))
    return torch.stack(totals).sum().sqrt().float() if totals else torch.zeros(())


def agree(gradients: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Gives all ranks of a mesh of one dimension the first one's gradients of what they hold whole. Collective.

    They are equal but for kernels that add up in an order of their own, as some do on accelerators. Left so, the copies
    of a parameter would drift apart and the norm, by which guards decide, would differ from rank to rank. One broadcast
    of few numbers: norms and biases, and an embedding only where its rows do not divide.
    """
    (name,) = mesh.mesh_dim_names or ("",)
    parts = [one.to_local() if isinstance(one, DTensor) else one for one in gradients if not _is_cut(one, name)]
    if not parts:
        return
    flat = torch.cat([part.flatten() for part in parts]).to(mesh.device_type)
    group = mesh.get_group()
    dist.broadcast(flat, group=group, group_src=0)
    for part, first in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
        part.copy_(first.view(part.shape))


def _is_cut(gradient: Tensor, dimension: str) -> bool:
    if not isinstance(gradient, DTensor):
        return False
    placed = dict(zip(gradient.device_mesh.mesh_dim_names or (), gradient.placements, strict=True))
    return dimension in placed and not placed[dimension].is_replicate()


def scale_down(gradients: Sequence[Tensor], most: float, norm: Tensor) -> None:
    """Scales gradients so that their norm, which is `norm` `()` now, is at most `most`; as torch's clipping does.

    Part by part, as torch's own (2.13, `clip_grads_with_norm_`) takes no tensors on different meshes.
    """
    parts = [one.to_local() if isinstance(one, DTensor) else one for one in gradients]
    if parts:
        torch._foreach_mul_(parts, (most / (norm + 1e-6)).clamp(max=1.0).to(parts[0].device))


def _squares(gradient: Tensor) -> Tensor:
    """Their sum `()` in float64. Accelerators add up as a tree; only on a CPU is a tensor taken in blocks."""
    if gradient.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(gradient)
        return norm.double().square()
    flat, blocks = gradient.flatten(), gradient.numel() // BLOCK
    of_blocks: Tensor = torch.linalg.vector_norm(flat[: blocks * BLOCK].view(blocks, BLOCK), dim=1)
    of_rest: Tensor = torch.linalg.vector_norm(flat[blocks * BLOCK :])
    return of_blocks.double().square().sum() + of_rest.double().square()
