"""The processes of a run: ranks, device, collectives that cannot wait for ever, and seeds."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loomtune import seeds
from loomtune.settings import from_environment

TIMEOUT = timedelta(minutes=from_environment("LOOMTUNE_TIMEOUT_MINUTES", 10, least=0.01))

derive = seeds.derive


@dataclass(frozen=True, slots=True)
class World:
    """Which process this is, among how many, on what device.

    replica, replicas: its place among the ranks that get different rows (see `Sharding.replicas`).
    counts: False where another rank with the same rows speaks for this one too.
    control: a gloo group for plain objects and small numbers; None for a single process.
    store: where the processes met; None for a single one.
    aside: what the rollout engine made to reach the ranks that train nothing (`Rollout.connect`); None without any.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    replica: int = 0
    replicas: int = 1
    counts: bool = True
    store: dist.Store | None = None
    aside: Any = None

    @property
    def leads(self) -> bool:
        """True on the one rank that writes what is written once."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over data replicas, in float64: ranks that share their rows count once."""
        return self.total(numbers if self.counts else [0.0] * len(numbers))

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all ranks, in float64."""
        if self.control is None:
            return list(numbers)
        total = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(number) for number in total]

    def gather(self, thing: Any) -> list[Any]:
        """A plain object from every rank, in rank order, on every rank."""
        if self.control is None:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def broadcast(self, thing: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.control is None:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def memory_bytes(self) -> int:
        """Peak memory of this rank so far: of the device's allocator, or the resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def barrier(self) -> None:
        """Waits for all ranks, at most as long as the group's time-out."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def gather_tensor(self, values: Tensor) -> Tensor:
        """Rows `(n, ...)` of every data replica, one after the other, on every rank; n may differ."""
        if self.control is None:
            return values
        parts = self.gather(values.detach().cpu() if self.counts else None)
        return torch.cat([part.to(values.device) for part in parts if part is not None])


def join() -> World:
    """Joins the processes that torchrun (or a scheduler in its manner) started; alone, without its variables."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0] if size > 1 else None
    return meet(World(rank, size, local_rank, device, store=store))


def meet(world: World) -> World:
    """Makes the process group of a world, whose ranks find each other in its store, and what follows from it."""
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"  # offloaded parameters meet on the CPU
    if world.size == 1:  # a group of one, without a rendezvous: device meshes ask for one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return world
    dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if backend != "gloo" else dist.group.WORLD
    return replace(world, control=control, replica=world.rank, replicas=world.size)


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def reseed(seed: int, step: int, replica: int) -> None:
    """Sets every global random state as a pure function of its arguments.

    Nothing of loomtune draws from a global state; plugins may. So a resumed step meets the state that it would have
    met, with nothing to save.
    """
    state = derive(seed, "global", step, replica)
    random.seed(state)
    torch.manual_seed(state)
