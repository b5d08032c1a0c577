"""First values of what LoRA adds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loomtune.world import derive

Pair = tuple[Tensor, Tensor]
"""A `(rank, inputs)` and B `(outputs, rank)`, in fp32."""


def drawn(layer: str, init: str, shape: tuple[int, int, int], seed: int) -> Pair:
    """First values that do not look at the base. shape: (inputs, outputs, rank)."""
    inputs, outputs, rank = shape
    a = derive(seed, layer, "lora_A")
    if init == "orthogonal":
        return _orthogonal(inputs, outputs, rank, a, derive(seed, layer, "lora_B"), derive(seed, layer, "turn"))
    if init == "gaussian":
        return _normal((rank, inputs), a) / rank, torch.zeros(outputs, rank)
    return draw((rank, inputs), a), torch.zeros(outputs, rank)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """First values of A, as in Microsoft's LoRA: those of torch's linear layers (He et al. 2015 with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def factors(weight: Tensor, init: str, rank: int, scale: float, seed: int) -> Pair:
    """First values that carry a part of the base, `scale * B A`, which is taken out of it.

    weight: `(outputs, inputs)`. PiSSA (Meng et al. 2024, equations 2 and 3): the strongest singular directions; OLoRA
    (Buyukakyuz 2024): the first ones of a QR factorisation. In fp64: what is taken out must be the same on every
    machine, and rounding would turn directions of like strength into one another.
    """
    weight = weight.double()
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].float().contiguous(), q[:, :rank].float().contiguous()
    if init == "pissa":
        left, strengths, right = torch.linalg.svd(weight, full_matrices=False)
        left, strengths, right = left[:, :rank], strengths[:rank], right[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, strengths, right = torch.svd_lowrank(weight, rank, niter=int(init.removeprefix("pissa_niter_")))
        right = right.T
    roots = (strengths / scale).sqrt()
    return (roots[:, None] * right).float().contiguous(), (left * roots).float().contiguous()


def _orthogonal(inputs: int, outputs: int, rank: int, a: int, b: int, turn: int) -> Pair:
    """A and B that are both alive and whose product is zero, as in peft: they span halves of one rotation."""
    rotation = torch.linalg.qr(_normal((rank, rank), turn))[0]
    first = (_normal((inputs, rank // 2), a) @ rotation[0::2]).T / 10
    return first.contiguous(), (_normal((rank // 2, outputs), b).T @ rotation[1::2] / 10).contiguous()


def _normal(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
