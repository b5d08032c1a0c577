"""What operations allocate inside themselves, where no tensor that passes by shows it.

Each rule names who allocates. Found on single operations, never fitted to a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

ACCELERATORS = ("cuda", "rocm")

WORKSPACE = 32 << 20
"""Bytes that cuBLAS works in on Hopper and later, and hipBLASLt: torch 2.13, `aten/src/ATen/cuda/CUDABlas.cpp`,
`parseChosenWorkspaceSize` (older ones: 8 MiB); one for the thread of the forward pass and one for the backward pass."""


def overhead(kind: str) -> int:
    """Bytes of the allocator that libraries keep as long as the process lives."""
    return 2 * WORKSPACE if kind in ACCELERATORS else 0


def sent(operation: str, largest: int, kind: str) -> int:
    """Within a collective. gloo gathers, and scatters what it reduced, through a flat copy of the whole tensor:
    torch 2.13, `torch/csrc/distributed/c10d/ProcessGroupGloo.cpp`; NCCL sends from where tensors lie."""
    return largest if kind not in ACCELERATORS and operation in ("all_gather", "reduce_scatter") else 0


def computed(name: str, args: Sequence[Any], kind: str) -> int:
    """Within any other operation. name: torch's, without namespace and overload."""
    if kind not in ACCELERATORS or "flash_attention" not in name or "backward" not in name:
        return 0
    _, query, key, *_ = [one for one in args if isinstance(one, Tensor) and one.ndim == 4]
    return _flash_backward(query, key)


def _flash_backward(query: Tensor, key: Tensor) -> int:
    """FlashAttention 2's sum of the queries' gradient in fp32 and one number for each query, and, where queries share
    keys, gradients of keys and values as if they did not: torch 2.13, `native/transformers/cuda/flash_attn/
    flash_api.cpp`, `mha_bwd` (`dq_accum`, `softmax_d`, `dk_expanded`, `dv_expanded`)."""
    rows, heads, length, width = query.shape
    each = rows * heads * (-(-length // 128) * 128) * 4 * (width + 1)
    shared = key.shape[1] != heads
    return each + (2 * rows * heads * key.shape[2] * width * key.element_size() if shared else 0)
