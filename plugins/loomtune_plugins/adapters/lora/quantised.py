"""Linear layers whose matrices are kept in 4 bits, as plain tensors of bytes.

The values and their packing are bitsandbytes' (Dettmers et al. 2023, "QLoRA", section 3), which quantises and unpacks.
Each row is quantised by itself, filled up with zeros to whole blocks. So rows can be read, packed and sharded by
themselves, and where a row is whole blocks already, the bytes are those of bitsandbytes.

All that a layer keeps is bytes, scales too: strategies convert frozen numbers to the type of computation, and a scale
in bf16 would be another one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = 256
"""Scales that share a scale of their own, under double quantisation."""

AT_ONCE = 1 << 22
"""Weights that are packed at a time: bitsandbytes takes up to 24 bytes for each of them on a CPU."""

NUMBER = torch.finfo(torch.float32).bits // 8


@dataclass(frozen=True, slots=True)
class Packing:
    """How a matrix `(rows, columns)` is kept. kind: `nf4` or `fp4`. double: scales are quantised as well."""

    rows: int
    columns: int
    kind: str = "nf4"
    block: int = 64
    double: bool = True

    @property
    def blocks(self) -> int:
        """Of each row."""
        return math.ceil(self.columns / self.block)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the tensors of bytes. packed: two weights a byte. scales: one a block. nested: scales of scales, the last
        row being the mean that was taken from the scales before."""
        width = self.blocks * self.block
        found = {"packed": (self.rows, width // 2), "scales": (self.rows, self.blocks * (1 if self.double else NUMBER))}
        if self.double:
            found["nested"] = (math.ceil(self.rows * self.blocks / SCALES) + 1, NUMBER)
        return found

    def filled(self, weight: Tensor) -> Tensor:
        """Rows of the matrix in whole blocks."""
        weight = weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.float()
        return F.pad(weight, (0, self.blocks * self.block - self.columns)).contiguous()

    def pack(self, weight: Tensor) -> Tensor:
        """Rows of the matrix, some or all, to `packed`."""
        if not len(weight):
            return torch.empty(0, self.shapes["packed"][1], dtype=torch.uint8)
        return torch.cat([self._packed(part) for part in torch.split(weight, max(1, AT_ONCE // self.columns))])

    def _packed(self, weight: Tensor) -> Tensor:
        found: Tensor = library().quantize_4bit(self.filled(weight), blocksize=self.block, quant_type=self.kind)[0]
        return found.view(len(weight), -1)

    def scales(self, weight: Tensor) -> Tensor:
        """Rows of the matrix, some or all, to the scales of their blocks `(rows, blocks)` fp32: the largest weights."""
        least, most = torch.aminmax(self.filled(weight).view(len(weight), self.blocks, self.block), dim=-1)
        return torch.maximum(most, -least).float()

    def nested(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """All scales of the matrix to `scales` and `nested`, quantised about their mean."""
        mean = scales.mean()
        quantised, state = library().quantize_blockwise((scales - mean).flatten(), blocksize=SCALES)
        return quantised.view(scales.shape), bytes_of(torch.cat([state.absmax, mean[None]])[:, None])

    def unpack(self, packed: Tensor, scales: Tensor, nested: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The matrix that is computed with, `(rows, columns)` in a type."""
        functional, width = library(), self.blocks * self.block
        numbers = _numbers(scales) if nested is None else _doubly(scales, _numbers(nested))
        state = functional.QuantState(numbers, (self.rows, width), None, self.block, self.kind, dtype)
        whole: Tensor = functional.dequantize_4bit(packed.reshape(-1, 1), state).view(self.rows, width)
        return whole if width == self.columns else whole[:, : self.columns].contiguous()


def bytes_of(numbers: Tensor) -> Tensor:
    """fp32 `(rows, n)` as bytes `(rows, 4 n)`."""
    return numbers.contiguous().view(torch.uint8)


def _numbers(held: Tensor) -> Tensor:
    """fp32 in a row. A strategy may have laid the bytes anywhere in a buffer of its own."""
    whole = held.contiguous()
    return (whole.clone() if whole.storage_offset() % NUMBER else whole).view(torch.float32).flatten()


def _doubly(scales: Tensor, nested: Tensor) -> Tensor:
    functional = library()
    state = functional.QuantState(nested[:-1], code=_values(scales.device), blocksize=SCALES, dtype=torch.float32)
    found: Tensor = functional.dequantize_blockwise(scales.flatten(), state)
    return found.add_(nested[-1])


@cache
def _values(device: torch.device) -> Tensor:
    """The 256 values of a scale in 8 bits."""
    found: Tensor = library().create_dynamic_map().to(device)
    return found


def library() -> Any:
    """bitsandbytes' functions, imported when the first matrix is packed: a skeleton needs none."""
    from bitsandbytes import functional

    return functional


class QuantisedLinear(nn.Linear):
    """A frozen linear layer of packed bytes; peft takes it for the `nn.Linear` that it computes as.

    Trained or evaluated, it computes alike: bitsandbytes' own layer repacks itself in eval mode on some processors.
    """

    packed: nn.Parameter
    scales: nn.Parameter
    nested: nn.Parameter | None

    def __init__(self, packing: Packing, bias: nn.Parameter | None) -> None:
        """bias: of the layer that this one replaces; it stays a plain tensor. The rest is born on the meta device."""
        nn.Module.__init__(self)  # not nn.Linear's, which makes a matrix
        self.packing, self.in_features, self.out_features = packing, packing.columns, packing.rows
        self.register_parameter("nested", None)
        for name, shape in packing.shapes.items():
            held = torch.empty(shape, dtype=torch.uint8, device="meta")
            self.register_parameter(name, nn.Parameter(held, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix `(out, in)` fp32, unpacked anew for each who asks, such as DoRA; nobody keeps it."""
        if self.packed.is_meta:
            return torch.empty(self.out_features, self.in_features, device="meta")
        with torch.no_grad():
            return self.packing.unpack(self.packed, self.scales, self.nested, torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        with torch.autocast(kind, enabled=False):
            result: Tensor = _Multiplied.apply(input, self.packed, self.scales, self.nested, bias, self.packing)  # type: ignore[no-untyped-call]
        return result


class _Multiplied(torch.autograd.Function):
    """`input @ weight.T + bias`, which unpacks again for the backward pass: kept, all matrices would be whole there."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        packed: Tensor,
        scales: Tensor,
        nested: Tensor | None,
        bias: Tensor | None,
        how: Packing,
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(packed, scales, nested)
        return F.linear(input, how.unpack(packed, scales, nested, input.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            packed, scales, nested = ctx.saved_tensors
            of_input = gradient @ ctx.how.unpack(packed, scales, nested, gradient.dtype)
        if ctx.needs_input_grad[4]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_input, None, None, None, of_bias, None
