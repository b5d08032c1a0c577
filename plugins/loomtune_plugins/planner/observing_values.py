"""What code asks of values: those of a batch are known and computed with; of all others the likeliest is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)

from loomtune.toolkit.log_probs import PLAIN

LARGEST = 1 << 20
"""Numbers of a tensor up to which it is really computed: masks of whole rows are not."""

aten = torch.ops.aten

WHOLE = (torch.int64, torch.int32, torch.bool)
"""Types of what says which and where: small tensors of these that are made out of nothing have values too."""


HOLDS = "_holds_in_a_rehearsal"
"""Set on the answer to whether all of some numbers are as they should be."""

INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""Operations that take a mask in the place of indices."""


def scalar(tensor: Tensor) -> Any:
    """What `.item()` gives of a tensor that holds nothing: that nothing is wrong anywhere and everything right, and a
    loss and a norm of 1."""
    if tensor.dtype is torch.bool:
        return getattr(tensor, HOLDS, False)
    return 1.0 if tensor.dtype.is_floating_point else 0 if tensor.dtype is torch.uint8 else 1


def computed(func: Any, args: Sequence[Any], given: Mapping[str, Any], inputs: Sequence[Tensor]) -> Any:
    """The operation's result: a real one where all that it takes is real and small, else one without values."""
    if not _known(func, args, given, inputs):
        if func._overloadpacket in INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        if func._overloadpacket is aten._grouped_mm and args[0].dtype is torch.float32:
            return _grouped(func, args, given)
        result = func(*args, **given)
        if func._overloadpacket is aten.all:
            setattr(result, HOLDS, True)
        return result
    if not func._schema.is_mutable:
        try:
            shaped = func(*args, **given)
        except (DataDependentOutputException, DynamicOutputShapeException):
            shaped = ()  # of real values, of which there are few
        if any(one.numel() > LARGEST for one in _tensors(shaped)):
            return shaped
    with unset_fake_temporarily():
        return func(*args, **given)


def _known(func: Any, args: Sequence[Any], given: Mapping[str, Any], inputs: Sequence[Tensor]) -> bool:
    if inputs:
        return all(not isinstance(one, FakeTensor) and one.device.type != "meta" for one in inputs)
    if func.namespace != "aten":
        return False
    said = given.get("dtype")
    counts = func._overloadpacket is aten.arange if said is None else said in WHOLE
    made = counts and all(isinstance(one, bool | int | list) for one in args)
    number = FakeTensor in PLAIN and _is_number(func, args)  # masks are made of these, and CPUs look into masks
    return (made or number) and torch.device(given.get("device") or "cpu").type == "cpu"


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with the places that masks of known values choose: how many these are is what a shape hangs on."""
    found: list[Tensor | None] = []
    for one in indices:
        if one is not None and one.dtype is torch.bool and not isinstance(one, FakeTensor):
            with unset_fake_temporarily():
                found += one.nonzero().unbind(1)
        else:
            found.append(one)
    return found


def _grouped(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    """A product with experts in fp32, which CPUs compute but of which torch (2.13) says no shape: as in bf16."""
    lower = [one.bfloat16() if isinstance(one, Tensor) and one.is_floating_point() else one for one in args]
    shaped = func(*lower, **given)
    return torch.empty_strided(shaped.shape, shaped.stride(), dtype=args[0].dtype, device=shaped.device)


def _is_number(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation makes a tensor of one number."""
    packet = func._overloadpacket
    return packet is aten.scalar_tensor or (packet is aten.zeros and args[0] == [])


def _tensors(result: Any) -> list[Tensor]:
    return [one for one in (result if isinstance(result, list | tuple) else [result]) if isinstance(one, Tensor)]
