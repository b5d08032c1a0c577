"""How much of their peaks kernels reach, as others measured and published it; never from whole training runs.

Each figure is a pair (ordinary, best): the first makes the high end of a forecast, the second its low end. Shares are
of the makers' dense peaks. What no publication at hand says is named in `assumed`, and a forecast repeats it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

Pair = tuple[float, float]
Curve = tuple[tuple[int, float, float], ...]
"""Shares of the peak by length of the rows: (tokens, ordinary, best)."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """One generation of accelerators.

    words: of the title of a `Hardware`, by which it is known. units: that a kernel's blocks are dealt out to; 0: none.
    matmul: by type of the factors. forward, backward: of attention by a flash kernel, its operations counted as
    FlashAttention-2 does (arXiv:2307.08691, section 4.1). memory: of the bandwidth. copy: of the link to the host.
    start: microseconds of a matmul that do not shrink with it. gap: of every other kernel. issue: of the host for each
    kernel.
    """

    words: tuple[str, ...]
    units: int
    matmul: Mapping[str, Pair]
    forward: Curve
    backward: Curve
    memory: Pair
    copy: Pair = (55.06 / 63, 55.43 / 63)
    start: Pair = (6.4, 4.3)
    gap: Pair = (2.9, 0.9)
    issue: Pair = (12.0, 5.0)
    assumed: tuple[str, ...] = ()


SOURCES = {
    "matmul, H100": "ordinary 720 of 989.5 TFLOP/s in bf16: mean over shapes of Llama 70B, normal values "
    "(SemiAnalysis, MI300X vs H100 vs H200 Benchmark Part 1, 2024); best 794.5: stas00/ml-engineering at 744d01e, "
    "Maximum Achievable Matmul FLOPS. cuBLAS at 6144 and 8192 cubed lies between: 741.1 and 797.8 "
    "(pranjalssh/fast.cu)",
    "matmul, A100": "best 271.2 of 312: ml-engineering. At 8192 cubed, with normal values, cuBLAS has 257 (He 2024, "
    "Strangely, Matrix Multiplications on GPUs Run Faster When Given Predictable Data, thonking.ai); over a model's "
    "shapes nobody published a mean: ordinary is to best as on H100",
    "matmul, B200": "ordinary 1448 of 2250: cuBLAS, projections of Llama 7B (arXiv:2604.23466, tables III and "
    "IV); best 1745: ml-engineering",
    "matmul, MI300X": "ordinary 620 of 1307 (SemiAnalysis); best 668.4: ml-engineering",
    "matmul, fp32": "ordinary 23.2 of an A6000's 38.7 TFLOP/s, cuBLAS at 4096 (Boehm 2022, How to Optimize a "
    "CUDA Matmul Kernel); best 90 %, as CUTLASS' README shows of sgemm",
    "attention, H100": "FlashAttention-3 (arXiv:2407.08608), figures 5 and 6, width 128: ordinary "
    "FlashAttention-2, best cuDNN, which scaled_dot_product_attention both calls; forward causal. The backward "
    "pass is published without a mask: times causal over plain of FlashAttention-3's "
    "(facebookexperimental/triton, pull 3582)",
    "attention, A100": "best 73 % forward, 63 % backward; ordinary 50 % (FlashAttention-2, arXiv:2307.08691, "
    "abstract and section 4.1)",
    "attention, B200": "long rows, forward: FlashAttention-4 has 1605 TFLOP/s, 1.3 times cuDNN 9.13 and 2.7 "
    "times Triton (together.ai/blog/flashattention-4): best cuDNN, ordinary Triton",
    "memory, NVIDIA": "best 91 % (Luo et al. 2024, arXiv:2402.13499: H100; A100 90.5 %); ordinary 2.98 of 4.0 "
    "TB/s: copy on GH200 (UoB-HPC/BabelStream, issue 194)",
    "memory, MI300X": "AMD's thresholds for BabelStream: Dot 3.66, Copy 4.18 of 5.3 TB/s (Instinct documentation)",
    "copy": "55.06 and 55.43 of 63 GB/s, eight H200 at once (ml-engineering, network/README.md)",
    "start": "what cuBLAS takes longer for 4096 and 2048 cubed than its speed at 8192 foretells, on B200 (pyptx.dev)",
    "gap": "kernels of 2.9 us follow each other every 3.8 us (Gray 2019, Getting Started with CUDA Graphs, NVIDIA)",
    "beside": "computation takes 18.9 % longer on average while messages are in flight: GPT and LLaMA on four A100, "
    "H100, MI250 (Lee et al. 2025, arXiv:2507.03114, abstract)",
    "uneven": "nominally equal accelerators differ by 8 % on average (Sinha et al. 2022, Not All GPUs Are Created "
    "Equal, arXiv:2208.11035, abstract)",
    "host": "1e9 parameters in 0.22 to 0.26 s, 28 bytes each: DeepSpeed's CPU-Adam on a node's CPUs "
    "(ZeRO-Offload, arXiv:2101.06840, table 4)",
    "issue": "assumed: what torch needs on a host to find and start a kernel. It shows in small models alone",
}
"""What each kind of figure is from."""

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_CAUSAL_BACKWARD = (181 / 424 / 2, 181 / 424, 316 / 501, 444 / 542, 539 / 559, 1.0)
"""Causal over plain; at 512 half of what it is at 1024, as between that and 2048 it nearly is."""


def _curve(ordinary: tuple[float, ...], best: tuple[float, ...], scale: tuple[float, ...] = (1.0,) * 6) -> Curve:
    return tuple((n, a * s, b * s) for n, a, b, s in zip(_LENGTHS, ordinary, best, scale, strict=True))


def _of(numbers: tuple[float, ...], whole: float) -> tuple[float, ...]:
    return tuple(number / whole for number in numbers)


_FORWARD = _curve(_of((191, 260, 298, 319, 333, 335), 989.5), _of((315, 410, 484, 518, 529, 539), 989.5))
_BACKWARD = _curve(
    _of((214, 260, 291, 310, 318, 322), 989.5), _of((305, 408, 465, 499, 518, 516), 989.5), _CAUSAL_BACKWARD
)


def _like(curve: Curve, ordinary: float, best: float) -> Curve:
    """A curve that rises with length as another does, to these shares."""
    return tuple((n, a / curve[-1][1] * ordinary, b / curve[-1][2] * best) for n, a, b in curve)


_FP32: Pair = (23.2 / 38.7, 0.90)
_BY_LENGTH = "attention at shorter rows falls as on H100"

KNOWN = (
    Efficiency(
        words=("H100", "H200", "H800", "GH200"),
        units=132,
        matmul={"bf16": (720 / 989.5, 794.5 / 989.5), "fp32": _FP32},
        forward=_FORWARD,
        backward=_BACKWARD,
        memory=(2.98 / 4.0, 0.91),
    ),
    Efficiency(
        words=("A100", "A800"),
        units=108,
        matmul={"bf16": (271.2 / 312 * 720 / 794.5, 271.2 / 312), "fp32": _FP32},
        forward=_like(_FORWARD, 0.50, 0.73),
        backward=_like(_BACKWARD, 0.50 * 0.63 / 0.73, 0.63),
        memory=(2.98 / 4.0, 0.905),
        assumed=(_BY_LENGTH, "matmuls of ordinary shapes are to the best ones as on H100"),
    ),
    Efficiency(
        words=("B200", "B300", "GB200", "B100"),
        units=148,
        matmul={"bf16": (1448 / 2250, 1745 / 2250), "fp32": _FP32},
        forward=_like(_FORWARD, 1605 / 2.7 / 2250, 1605 / 1.3 / 2250),
        backward=_like(_BACKWARD, 1605 / 2.7 / 2250 * 322 / 335, 1605 / 1.3 / 2250 * 516 / 539),
        memory=(2.98 / 4.0, 0.91),
        assumed=(_BY_LENGTH, "attention's backward pass is to its forward pass as on H100"),
    ),
    Efficiency(
        words=("MI300", "MI325"),
        units=304,
        matmul={"bf16": (620 / 1307.4, 668.4 / 1307.4), "fp32": _FP32},
        forward=_like(_FORWARD, 335 / 720 * 620 / 1307.4, 539 / 794.5 * 668.4 / 1307.4),
        backward=_like(_BACKWARD, 322 / 720 * 620 / 1307.4, 516 / 794.5 * 668.4 / 1307.4),
        memory=(3.66 / 5.3, 4.18 / 5.3),
        assumed=("attention is to matmuls as on H100: no table of both passes is at hand for this accelerator",),
    ),
)

CPU = Efficiency(
    words=(),
    units=0,
    matmul={"fp32": (0.50, 0.85), "bf16": (0.35, 0.85)},
    forward=tuple((n, 0.20, 0.50) for n in _LENGTHS),
    backward=tuple((n, 0.15, 0.45) for n in _LENGTHS),
    memory=(0.55, 0.95),
    start=(4.0, 1.0),
    gap=(8.0, 2.0),
    issue=(0.0, 0.0),
    assumed=("shares of a CPU's peak differ by library, clock and neighbours: wide on purpose",),
)

UNKNOWN = Efficiency(
    words=(),
    units=0,
    matmul={"bf16": (0.47, 0.80), "fp32": _FP32},
    forward=_like(_FORWARD, 0.22, 0.55),
    backward=_like(_BACKWARD, 0.21, 0.52),
    memory=(0.69, 0.91),
    assumed=("nothing published is at hand for this accelerator: the span of those that are known",),
)

HOST_BANDWIDTH: Pair = (28 / 0.26, 2 * 28 / 0.22)
"""GB/s of a node's host memory that an optimizer step moves: as measured in nodes of 2018, and twice that (DDR5)."""

BESIDE = 0.189
"""How much longer kernels take in the ordinary while messages are in flight, which need the same memory and power."""

UNEVEN = 0.08
"""How much longer the slowest of several accelerators takes than one that was measured, should that be the quickest."""

HASHING: Pair = (0.4, 1.5)
"""GB/s of sha256 that one process writes a checkpoint's file at, without and with a CPU's own instructions for it."""


def efficiency_of(kind: str, title: str) -> Efficiency:
    """By what a `Hardware` calls itself."""
    if kind == "cpu":
        return CPU
    words = title.upper().replace("-", " ").split()
    if "PCIE" in words:  # the same chip with half the power: not what was measured
        return UNKNOWN
    return next((one for one in KNOWN if any(w.startswith(name) for w in words for name in one.words)), UNKNOWN)


def at(curve: Curve, length: float) -> Pair:
    """Shares at a length: between two measured ones by the logarithm, below all of them in proportion."""
    if length <= curve[0][0]:
        part = max(length, 1.0) / curve[0][0]
        return curve[0][1] * part, curve[0][2] * part
    for (n, a, b), (m, c, d) in itertools.pairwise(curve):
        if length <= m:
            part = math.log2(length / n) / math.log2(m / n)
            return a + (c - a) * part, b + (d - b) * part
    return curve[-1][1:]
