"""Collectives, as they are asked for: torch's c10d operations, which every library comes down to, functional or not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loomtune_plugins.planner.trace import Collective

C10D, FUNCTIONAL = torch.ops.c10d, torch.ops._c10d_functional

NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "broadcast": "broadcast",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
"""By torch's names of operations (2.13), in `c10d` and `_c10d_functional`."""


ROOTED = ("broadcast", "reduce", "gather", "scatter")
"""Operations of which one rank has, or gets, the whole: it is named first."""

BEHIND = ("torch.distributed.fsdp", "torch.nn.parallel")
HOOKS = ("shardings.replicated", "shardings.zero_rehearsal")
"""Modules, or ends of their names, whose collectives have computation to hide behind."""


def is_collective(func: Any) -> bool:
    """Whether an operation sends anything, or waits for it."""
    return func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


def seen(func: Any, args: Sequence[Any], result: Any, phase: str) -> Collective | None:
    """What an operation sends; None for one that only waits, and for a group of one."""
    operation = NAMES.get(func._overloadpacket.__name__)
    ranks = _ranks(args)
    if operation is None or len(ranks) < 2:
        return None
    sides = [side for side in (_tensors([one]) for one in (*args, result)) if side]
    size = max(sum(one.nbytes for one in side) for side in sides)
    if operation in {"gather", "scatter"}:  # others than the root have but their part
        size = min(sum(one.nbytes for one in side) for side in sides) * len(ranks)
    if operation in ROOTED:
        root = ranks[next(one for one in args if type(one) is int)]
        ranks = (root, *(rank for rank in ranks if rank != root))
    if operation == "send":
        ranks = dist.get_rank(), ranks[args[2]]
    dtype = name_of(sides[0][0].dtype)
    return Collective(operation, size * (operation != "barrier"), ranks, phase, dtype, hidden=_overlaps())


def buffers(args: Sequence[Any]) -> list[Tensor]:
    """The tensors that an operation sends from and receives in, the outputs first."""
    return _tensors(args)


def name_of(dtype: torch.dtype) -> str:
    """As `hardware.tflops` names types: bf16, fp32, ..."""
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}.get(name, name)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for one in args:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += _tensors(one)
    return found


def _overlaps() -> bool:
    """Whether the call comes from code that computes on while it is under way: of parameters and of gradients."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(BEHIND) or name.endswith(HOOKS):
            return True
        frame = frame.f_back
    return False


def _ranks(args: Sequence[Any]) -> tuple[int, ...]:
    for one in args:
        if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(one)))
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    for name in reversed([one for one in args if isinstance(one, str)]):
        try:
            return tuple(dist.get_process_group_ranks(resolve(name)))
        except (RuntimeError, ValueError):
            continue
    return ()
