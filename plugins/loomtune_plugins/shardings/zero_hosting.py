"""Which of DeepSpeed's tensors lie in a host's memory, where a rehearsal has but one device for both.

It says so itself: what it offloads it makes on "cpu", all else on `get_accelerator().current_device_name()`. Within the
functions that make what is offloaded, the accelerator is called `cpu:0`, and everything not made there is the host's.
Pinned memory is the host's everywhere. torch rounds each piece of it up to a power of two (2.13,
`ATen/core/CachingHostAllocator.h`, `allocate`), which is left out here: it does not grow evenly with a model's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loomtune.toolkit.placing import on_host

NEAR = "cpu:0"
"""The accelerator, within functions that make tensors of the host."""

MAKERS = {
    "stage3.DeepSpeedZeroOptimizer_Stage3": ("_create_fp32_partitions", "_setup_for_real_optimizer", "_optimizer_step"),
    "stage_1_and_2.DeepSpeedZeroOptimizer": ("__init__", "_optimizer_step"),
}
"""Functions of `deepspeed.runtime.zero` (0.19.8) that make masters, their gradients, and the optimizer's state."""

FLATTENS = "stage_1_and_2.DeepSpeedZeroOptimizer", "flatten_dense_tensors_aligned"
"""Lays the parameters that compute side by side, where they are."""


@contextmanager
def hosting(offloads: bool) -> Iterator[None]:
    """Within it what DeepSpeed offloads counts as its host's. offloads: whether it does."""
    if not offloads:
        yield
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import zero

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(get_accelerator(), "pin_memory", _pinned))
        wrapped = [(kind, name, _apart) for kind, names in MAKERS.items() for name in names]
        for where, name, wrap in [*wrapped, (*FLATTENS, _beside)]:
            module, kind = where.split(".")
            owner = getattr(getattr(zero, module), kind)
            patches.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        yield


def _beside(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose results are not the host's."""
    return on_host(False)(method)


def _apart(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with what it makes on the accelerator told from what it makes on the host."""
    from deepspeed.accelerator import get_accelerator

    @wraps(method)
    def call(*args: Any, **given: Any) -> Any:
        named = mock.patch.object(get_accelerator(), "current_device_name", lambda: NEAR)
        with named, on_host(), Apart():
            return method(*args, **given)

    return call


class Apart(TorchFunctionMode):
    """Within it what is made on the accelerator by name is not the host's, as is all else."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if not any(_near(one) for one in (*args, *given.values())):
            return func(*args, **given)
        given = {name: "cpu" if _near(one) else one for name, one in given.items()}
        if func is Tensor.to:
            given["copy"] = True
        with on_host(False):
            return func(*("cpu" if _near(one) else one for one in args), **given)


def _near(thing: Any) -> bool:
    return isinstance(thing, str | torch.device) and str(thing) == NEAR


def _pinned(tensor: Tensor, align_bytes: int = 1) -> Tensor:
    """A copy in pinned memory."""
    with on_host():
        return tensor.clone()
