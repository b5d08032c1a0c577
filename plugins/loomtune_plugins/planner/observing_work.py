"""What operations cost: products of matrices with their shapes, attention, and what is bound by memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from loomtune_plugins.planner.observing_collectives import name_of
from loomtune_plugins.planner.trace import Work

aten = torch.ops.aten

FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
"""Operations beside views that read and write nothing."""


LOOKED = {"embedding", "index", "index_select", "gather"}
"""Operations that read some rows of a tensor."""


def work(func: Any, args: Sequence[Any], given: Mapping[str, Any], result: Any, phase: str, again: bool) -> Work | None:
    """One operation; None for one that moves nothing."""
    packet = func._overloadpacket
    name = packet.__name__
    if func.is_view or name in FREE or func.namespace == "prim":
        return None
    inputs, outputs = tensors([*args, *given.values()]), tensors([result])
    touched = float(sum(one.nbytes for one in {id(one): one for one in (*inputs, *outputs)}.values()))
    if name in LOOKED:  # as many rows as come out, and not the whole table
        touched = 2.0 * sum(one.nbytes for one in outputs)
    factors = [one for one in inputs if one.is_floating_point()] or outputs
    dtype = name_of(factors[0].dtype) if factors else "int64"
    if "scaled_dot_product" in name:
        shape = _attention(args, given)
        flops = _flops(packet, args, given, result) or _attended(shape, "backward" in name)
        return Work("attention", dtype, phase, shape, flops, touched, again)
    if shape := _matmul(name, args):
        return Work("matmul", dtype, phase, shape, 2.0 * math.prod(shape), touched, again)
    flops = float(sum(one.numel() for one in outputs))
    return Work("other", dtype, phase, (), flops, touched, again)


def tensors(things: Sequence[Any]) -> list[Tensor]:
    """All tensors in arguments, lists of them too."""
    found: list[Tensor] = []
    for one in things:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += tensors(one)
    return found


def _matmul(name: str, args: Sequence[Any]) -> tuple[int, ...]:
    """(batch, m, k, n); empty for another operation."""
    if name in ("mm", "_int_mm"):
        (m, k), n = args[0].shape, args[1].shape[1]
        return 1, m, k, n
    if name == "addmm":
        (m, k), n = args[1].shape, args[2].shape[1]
        return 1, m, k, n
    if name in ("bmm", "baddbmm"):
        left, right = args[-2:] if name == "bmm" else args[1:3]
        return (*left.shape, right.shape[2])
    if name == "_linear_pointwise":  # oneDNN's, by which `shardings/linear.py` computes on some processors
        *rows, k = args[0].shape
        return 1, math.prod(rows), k, args[1].shape[0]
    if name == "_grouped_mm":  # each row meets one of the experts
        return 1, args[0].shape[-2], args[0].shape[-1], args[1].shape[-1]
    return ()


def _attention(args: Sequence[Any], given: Mapping[str, Any]) -> tuple[int, ...]:
    """(rows x heads, queries, keys, width, causal) of query, key and value, after a gradient where there is one."""
    query, key, *_ = [one for one in args if isinstance(one, Tensor) and one.ndim == 4][:2]
    flags = [one for one in (*args, *given.values()) if isinstance(one, bool)]
    return query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3], int(any(flags))


def _attended(shape: tuple[int, ...], backward: bool) -> float:
    """Two products forward; five backward, as the scores are computed again."""
    rows, queries, keys, width, _ = shape
    return (5 if backward else 2) * 2.0 * rows * queries * keys * width


def _flops(packet: Any, args: Sequence[Any], given: Mapping[str, Any], result: Any) -> float:
    count = flop_registry.get(packet)
    try:
        return float(count(*args, **given, out_val=result)) if count else 0.0
    except (TypeError, AssertionError, ValueError, IndexError):
        return 0.0
