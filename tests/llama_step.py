"""A step of a Llama under FSDP, written down by hand as a rehearsal would see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loomtune_plugins.planner.trace import Collective, Peak, Trace, Work

ELEMENTWISE = 50
"""Kernels of a block's pass that are bound by memory."""


@dataclass(frozen=True)
class Llama:
    """What of its config decides work and bytes. keys: width of all keys."""

    layers: int
    width: int
    wide: int
    keys: int = 1024
    vocabulary: int = 128256

    @property
    def products(self) -> list[tuple[int, int]]:
        """(in, out) of a block's linear layers."""
        width, wide = self.width, self.wide
        return [(width, width)] * 2 + [(width, self.keys)] * 2 + [(width, wide)] * 2 + [(wide, width)]

    @property
    def block(self) -> int:
        """Parameters of one."""
        return sum(a * b for a, b in self.products) + 2 * self.width

    @property
    def parameters(self) -> int:
        """All."""
        return self.layers * self.block + 2 * self.vocabulary * self.width + self.width


LLAMA_8B = Llama(layers=32, width=4096, wide=14336)
LLAMA_70B = Llama(layers=80, width=8192, wide=28672)


def matmul(phase: str, m: int, k: int, n: int, count: float) -> Work:
    """A product in bf16."""
    return Work("matmul", "bf16", phase, (1, m, k, n), 2.0 * m * k * n, 2.0 * (m * k + k * n + m * n), count=count)


def one_pass(llama: Llama, phase: str, rows: int, length: int) -> list[Work]:
    """The blocks, forward."""
    tokens, heads = rows * length, rows * llama.width // 128
    scores = 2.0 * heads * length * length * 128  # of both products, under the causal mask
    attention = Work("attention", "bf16", phase, (heads, length, length, 128, 1), scores, 8.0 * tokens * llama.width)
    passed = tokens * (110.0 * llama.width + 10 * llama.wide) / ELEMENTWISE
    other = Work("other", "bf16", phase, (), 0, passed, count=llama.layers * ELEMENTWISE)
    products = [matmul(phase, tokens, k, n, llama.layers) for k, n in llama.products]
    return [*products, replace(attention, count=llama.layers), other]


def work_of(llama: Llama, rows: int, length: int, recompute: bool) -> Iterator[Work]:
    """Forward and backward of one micro-batch."""
    tokens, head = rows * length, (llama.width, llama.vocabulary)
    forward = [*one_pass(llama, "forward", rows, length), matmul("forward", tokens, *head, 1)]
    yield from forward
    yield Work("other", "fp32", "forward", (), 0, 12.0 * tokens * llama.vocabulary)
    if recompute:
        yield from (replace(one, again=True) for one in one_pass(llama, "backward", rows, length))
    for one in forward:
        if one.kind == "matmul":
            _, m, k, n = one.shape
            yield from (matmul("backward", m, n, k, one.count), matmul("backward", k, m, n, one.count))
        elif one.kind == "attention":
            yield replace(one, phase="backward", flops=2.5 * one.flops)
        else:
            yield replace(one, phase="backward", count=2 * one.count)


def collectives_of(llama: Llama, ranks: int, replicate: int, micro: int) -> Iterator[Collective]:
    """Parameters are gathered in bf16 in every pass, gradients reduced in fp32 after the last."""
    shard, across = tuple(range(ranks // replicate)), tuple(range(0, ranks, ranks // replicate))
    root = llama.parameters - llama.layers * llama.block
    yield Collective("all_gather", 2 * root, shard, "forward", "bf16", micro, hidden=False)
    for phase in ("forward", "backward"):
        yield Collective("all_gather", 2 * llama.block, shard, phase, "bf16", llama.layers * micro)
    for size, count in ((llama.block, llama.layers), (root, 1)):
        yield Collective("reduce_scatter", 4 * size, shard, "backward", "fp32", count)
        if replicate > 1:
            yield Collective("all_reduce", 4 * size // len(shard), across, "backward", "fp32", count)


def llama_step(
    llama: Llama,
    *,
    rows: int = 1,
    length: int = 8192,
    ranks: int = 8,
    replicate: int = 1,
    micro: int = 1,
    recompute: bool = True,
) -> Trace:
    """The first rank's. rows: of a micro-batch. replicate: copies of the sharded whole."""
    held = llama.parameters * replicate // ranks
    work = [replace(one, count=one.count * micro) for one in work_of(llama, rows, length, recompute)]
    work.append(Work("other", "fp32", "optimizer", (), 0, 28.0 * held))
    tokens = micro * rows * length
    return Trace(
        rank=0,
        processes=ranks,
        blocks=llama.layers,
        moments={
            "forward": Peak(40 << 30, {"activations": 40 << 30}),
            "backward": Peak(60 << 30, {"gradients": 60 << 30}),
        },
        kept={"parameters": 4 * held, "optimizer": 8 * held},
        host={},
        collectives=list(collectives_of(llama, ranks, replicate, micro)),
        work=work,
        tokens=tokens,
        targets=tokens,
        micro=micro,
        parameters=(llama.parameters,) * 3,
    )
