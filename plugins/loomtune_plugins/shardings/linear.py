"""Linear layers on CPUs where torch's own choice of library leaves half of the processor idle.

torch multiplies fp32 matrices by MKL, which keeps to AVX2 on processors that Intel did not make. oneDNN, which torch
brings along too, uses AVX-512 there: on an AMD EPYC (Zen 5) 160 to 200 GFLOP/s a core instead of 90 (torch 2.13).
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loomtune.toolkit.log_probs import PLAIN

LEAST = 1 << 16
"""Weights below which a layer stays as it is: the call costs more than it saves."""

WIDE = 8
"""Outputs over inputs from which on a layer's weight gradient is computed transposed: a sixth quicker for a head of
32,000 by 384, and a tenth slower for layers that are not wide."""


def quicken(module: nn.Module) -> None:
    """Lets every large linear layer below a module compute by oneDNN, where that is the quicker library.

    The same sums in another order, as any two libraries compute them. Other types than fp32, other devices, autocast
    and weights that are spread over ranks go the old way, call by call.
    """
    if not pays():
        return
    for part in module.modules():
        if type(part) is nn.Linear and part.weight.numel() >= LEAST:
            part.forward = MethodType(_forward, part)  # type: ignore[method-assign]


@cache
def pays() -> bool:
    """True on x86 processors with AVX-512 that are not Intel's, where torch was built with both libraries."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "GenuineIntel" not in _processor()
    )


def _processor() -> str:
    """What Linux says of the processor; elsewhere nothing is known, and MKL stays."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel"


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = self.weight, self.bias
    if not _takes(input, weight):
        return F.linear(input, weight, bias)
    result: Tensor = _OneDnn.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _takes(input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may multiply them here."""
    return bool(
        {type(input), type(weight)} <= PLAIN  # a tensor that is spread over ranks is of a type of its own
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.numel()
        and not torch.is_autocast_enabled("cpu")
    )


def unhold(module: nn.Module) -> None:
    """Lets linear layers below a module keep their parameter for the backward pass, and not what is in it now.

    torch keeps a transposed view. Where parameters are gathered for a pass and freed after it (ZeRO's stage 3), that
    view holds every gathered weight from the forward to the backward pass: the whole model, on each rank.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = MethodType(_unheld, part)  # type: ignore[method-assign]


def _unheld(self: nn.Linear, input: Tensor) -> Tensor:
    quick = pays() and self.weight.numel() >= LEAST and _takes(input, self.weight)
    result: Tensor = (_OneDnn if quick else _Unheld).apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
    return result


class _Unheld(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        of_input = (rows @ weight).view(input.shape) if wanted[0] else None
        of_weight = rows.t() @ input.reshape(-1, input.shape[-1]) if wanted[1] else None
        return of_input, of_weight, rows.sum(0) if wanted[2] else None


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _multiplied(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        of_input = _multiplied(rows, weight.t()).view(input.shape) if wanted[0] else None
        of_weight = _crossed(rows, input.reshape(-1, input.shape[-1])) if wanted[1] else None
        return of_input, of_weight, rows.sum(0) if wanted[2] else None


def _crossed(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`. oneDNN copies a first factor that is transposed; for a head that would be its logits."""
    if left.shape[1] < WIDE * right.shape[1]:
        return _multiplied(left.t(), right.t())
    return _multiplied(right.t(), left.t()).t()


def _multiplied(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right.T + bias`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return result
