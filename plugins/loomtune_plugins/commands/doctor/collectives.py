"""How fast the whole group reduces and gathers.

Bandwidths as nccl-tests reports them (doc/PERFORMANCE.md): for S bytes (of an all-gather: what each rank ends with) in
t seconds on n ranks, the bus bandwidth is S/t * 2(n-1)/n of an all-reduce and S/t * (n-1)/n of an all-gather. It can be
compared with what one link carries, whatever n is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

KINDS = ("all-reduce", "all-gather")
SIZES = tuple(1024 * 4**power for power in range(9))  # 1 KiB to 64 MiB
QUICK_SIZES = SIZES[::3]  # 1 KiB, 64 KiB, 4 MiB
MOST_TIMES = 100


def bus_factor(kind: str, ranks: int) -> float:
    """What the bandwidth of an algorithm is multiplied by."""
    return {"all-reduce": 2.0, "all-gather": 1.0}[kind] * (ranks - 1) / ranks


def sweep(kind: str, device: torch.device, seconds: float, quick: bool) -> list[dict[str, Any]]:
    """Each size's seconds and bus bandwidth, about so many seconds each; ends where a size would take far longer.

    Every rank gives the same: times are those of the slowest.
    """
    found: list[dict[str, Any]] = []
    for asked in QUICK_SIZES if quick else SIZES:
        work, size = _work(kind, asked, device)
        once = _together(min(_timed(work, 1, device), _timed(work, 1, device)))  # the first makes connections
        times = int(max(1, min(MOST_TIMES, seconds / max(once, 1e-6))))
        took = _together(_timed(work, times, device) / times) if times > 1 else once
        bandwidth = size / took * bus_factor(kind, dist.get_world_size())
        found.append({"kind": kind, "bytes": size, "seconds": took, "bus_bandwidth": bandwidth, "times": times})
        if took * 4 > 2 * seconds:  # the next has four times as many bytes, or more
            break
    return found


def devices() -> Iterator[tuple[str, torch.device]]:
    """Each backend of the group with the device that it serves."""
    yield "gloo", torch.device("cpu")
    if "nccl" in str(dist.get_backend_config()):
        yield "nccl", torch.device("cuda", torch.cuda.current_device())


def collectives(seconds: float, quick: bool) -> list[dict[str, Any]]:
    """All sweeps, each line with its backend."""
    return [
        {"backend": backend, **line}
        for backend, device in devices()
        for kind in KINDS
        for line in sweep(kind, device, seconds, quick)
    ]


def _work(kind: str, size: int, device: torch.device) -> tuple[Callable[[], Any], int]:
    """What is timed, and its bytes: what was asked for, divided evenly."""
    ranks = dist.get_world_size()
    if kind == "all-reduce":
        whole = torch.zeros(size // 4, device=device)
        return lambda: dist.all_reduce(whole), size
    part = torch.zeros(max(1, size // 4 // ranks), device=device)
    gathered = torch.zeros(part.numel() * ranks, device=device)
    return lambda: dist.all_gather_single(gathered, part), gathered.numel() * 4


def _timed(work: Callable[[], Any], times: int, device: torch.device) -> float:
    _together(0.0)  # all begin at once
    began = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _together(seconds: float) -> float:
    """That of the slowest rank, on all of them, so that all count alike."""
    slowest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
