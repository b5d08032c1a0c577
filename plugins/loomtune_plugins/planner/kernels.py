"""How long one kernel takes: the longer of its operations and its bytes, at shares of the peaks that others measured.

Williams et al. 2009, "Roofline"; the shares and where they are from: `efficiency`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loomtune.settings import Hardware
from loomtune_plugins.planner.efficiency import HOST_BANDWIDTH, Efficiency, Pair, at
from loomtune_plugins.planner.trace import Work

TILES = ((128, 256), (256, 128), (128, 128))
"""Blocks of a product's rows and columns that cuBLAS gives to a multiprocessor (NVIDIA, Matrix Multiplication
Background User's Guide, section 4); it also cuts the sum into as many as eight parts where there are too few."""

FILLED = 0.95
"""Of the multiprocessors that matmuls as large as the published ones keep busy: what they lose is in their figures."""

TYPES = {"bfloat16": "bf16", "float16": "bf16", "fp16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds: at best, and in the ordinary."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> Span:
        return Span(self.low * times, self.high * times)

    def at_least(self, other: Span) -> Span:
        """The longer of two things that are done side by side."""
        return Span(max(self.low, other.low), max(self.high, other.high))


def seconds(one: Work, hardware: Hardware, known: Efficiency) -> Span:
    """Seconds of one kernel, its start included; a figure that the hardware lacks costs nothing.

    `host` is what CPUs move in memory, of which a process has its accelerator's share of a node; `copy` what crosses
    the link between an accelerator and its host.
    """
    if one.kind == "host":
        return moved(one.bytes * hardware.per_node, 1.0, HOST_BANDWIDTH)
    if one.kind == "copy":
        return moved(one.bytes, hardware.host.gb_per_second, known.copy) + _microseconds(hardware.host.microseconds)
    taken = moved(one.bytes, hardware.memory_gb_per_second, known.memory)
    peak = peak_of(one.dtype, hardware) / 1e9
    if one.kind == "matmul":
        fill = min(1.0, filled(one.shape, known.units) / FILLED)
        taken = taken.at_least(moved(one.flops, peak * fill, shares(one.dtype, known)))
    elif one.kind == "attention":
        taken = taken.at_least(moved(attention(one), peak, curve(one, known)))
    wait = known.start if one.kind == "matmul" else known.gap
    return taken + _microseconds(wait[1], wait[0])


def shares(dtype: str, known: Efficiency) -> Pair:
    """Of the peak that matmuls reach, (ordinary, best); of a type that nobody measured, those of bf16."""
    return known.matmul.get(_short(dtype), known.matmul["bf16"])


def moved(amount: float, giga: float, reached: Pair) -> Span:
    """Seconds for bytes or operations at shares (ordinary, best) of so many 10^9 a second; none where that is 0."""
    return Span(*(amount / (giga * 1e9 * share) for share in (reached[1], reached[0]))) if giga else Span()


def attention(one: Work) -> float:
    """Operations as the published curves count them: two products forward, five backward, half of them under a mask."""
    heads, queries, keys, width, *causal = one.shape
    return (10.0 if _backward(one) else 4.0) * heads * queries * keys * width * (0.5 if causal and causal[0] else 1.0)


def curve(one: Work, known: Efficiency) -> Pair:
    """Shares of the peak that attention reaches in rows of this length."""
    return at(known.backward if _backward(one) else known.forward, min(one.shape[1:3]))


def filled(shape: Sequence[int], units: int) -> float:
    """Share of the multiprocessors' work on a product (batch, m, k, n) that counts.

    The rest is past its edges, or lost in the last round of blocks (tile and wave quantisation).
    """
    if not units or len(shape) < 4 or not all(shape):
        return 1.0
    batch, rows, inner, columns = shape[:4]
    best = 0.0
    for high, wide in TILES:
        blocks = batch * -(-rows // high) * -(-columns // wide)
        used = batch * rows * columns / (blocks * high * wide)
        cuts = [blocks * cut for cut in (1, 2, 4, 8) if cut == 1 or inner // cut >= 512]
        best = max(best, *(used * many / (units * -(-many // units)) for many in cuts))
    return best


def peak_of(dtype: str, hardware: Hardware) -> float:
    """Operations a second; of a type that the hardware says nothing of, those of the one that it is computed in."""
    peaks = hardware.tflops
    return 1e12 * (peaks.get(_short(dtype)) or peaks.get("bf16") or peaks.get("fp32") or 0.0)


def _backward(one: Work) -> bool:
    return one.phase == "backward" and not one.again


def _short(dtype: str) -> str:
    name = dtype.removeprefix("torch.")
    return TYPES.get(name, name)


def _microseconds(low: float, high: float | None = None) -> Span:
    return Span(low, low if high is None else high) * 1e-6
