"""Dropout whose masks belong to the data and not to the machine.

torch draws masks from a global state, so they change with the order of rows, the world size, the micro-batch, padding
and packing. Here the mask of an entry is a pure function of (seed, layer, sample number, segment within the sample,
position, channel). Only integer arithmetic decides, so a CPU and a GPU drop the same entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loomtune.contracts import Batch
from loomtune.errors import UserError
from loomtune.world import derive


@dataclass(slots=True)
class _State:
    """The keys of the micro-batch being computed; no context variable, as autograd recomputes in threads of its own."""

    keys: Tensor | None = None
    inside: bool = False


_state = _State()


def dropout_keys(batch: Batch) -> AbstractContextManager[None]:
    """Around a training forward: says which samples and positions the entries of a layer belong to.

    The keys outlive the context, because activation checkpointing recomputes in the backward pass. Where forwards of
    *several* batches come before the first backward, pass `recompute_keys` to `torch.utils.checkpoint` as `context_fn`.
    """
    return _using(batch_keys(batch))


def recompute_keys() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A `context_fn` for `torch.utils.checkpoint(use_reentrant=False)`: recomputes with the keys of its own forward."""
    return nullcontext(), nullcontext() if _state.keys is None else _using(_state.keys)


@contextmanager
def _using(keys: Tensor) -> Iterator[None]:
    outer, was_inside = _state.keys, _state.inside
    _state.keys, _state.inside = keys, True
    try:
        yield
    finally:
        _state.inside = was_inside
        if was_inside:
            _state.keys = outer


def batch_keys(batch: Batch) -> Tensor:
    """`(rows, length)` int64 hashes of (sample number, segment within the sample, position); padding has any.

    Two answers of one sample stand at the same positions, and their segment tells them apart; copies of a prompt that
    is computed for each of them are masked alike.
    """
    segment = _mix64(_mix64(batch.sample_numbers[batch.sample_of_segment]) + batch.part)
    # One more entry, which `NO_SEGMENT` (-1) reads, also in a micro-batch of padding alone.
    segment = torch.cat([segment, segment.new_zeros(1)])
    return _mix64(segment[batch.segments] + batch.positions * _signed(0x9E3779B97F4A7C15, 64))


class SeededDropout(nn.Module):
    """Zeroes entries with probability p and scales the others by 1/(1-p), in training only.

    x: `(rows, length, channels)`, or more dimensions after the length, in the layout of the batch given to
    `dropout_keys`. Raises UserError for another layout, in which nobody could say which sample an entry belongs to.
    """

    def __init__(self, p: float, seed: int, name: str) -> None:
        super().__init__()
        assert 0 <= p < 1, f"dropout of {name} must lie in [0, 1), not be {p}"
        self.p, self.name = p, name
        self.salt = derive(seed, "dropout", name)
        self._channel_hashes: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and type."""
        if not self.training or self.p == 0:
            return x
        # Multiplying twice, because 1/(1-p) as a bf16 mask would be off by up to 2^-9 in the mean.
        return (x * self.mask(x).to(x.dtype)).mul_(1 / (1 - self.p))

    def mask(self, x: Tensor) -> Tensor:
        """Which entries of x are kept: bool, of its shape."""
        keys = _current_keys()
        if x.dim() < 3 or x.shape[:2] != keys.shape:
            raise UserError.of(
                f"dropout cannot be seeded in the layer '{self.name}': it gets {tuple(x.shape)} where the batch is "
                f"{tuple(keys.shape)} (rows, length), so its entries have lost their samples",
                "set the dropout of this layer to 0, or leave the layer out of what is adapted",
            )
        channels = self._channels(math.prod(x.shape[2:]), x.device)
        hashes = _narrow(_mix64(keys ^ self.salt)).unsqueeze(-1) ^ channels
        threshold = round(self.p * 2**32) - 2**31
        return (_mix32_(hashes) >= threshold).view(x.shape)

    def _channels(self, count: int, where: torch.device) -> Tensor:
        """`(count,)` int32 hashes of the channel numbers, kept because they are the same in every pass."""
        known = self._channel_hashes
        if known is None or len(known) != count or known.device != where:
            known = _narrow(_mix64(torch.arange(1, count + 1, device=where) ^ self.salt))
            self._channel_hashes = known
        return known


def replace_dropout(module: nn.Module, seed: int) -> int:
    """Puts a `SeededDropout` in the place of every `nn.Dropout` with p > 0 and gives their number.

    The layer's path names its masks, so call it before anything wraps blocks and renames them.
    """
    found = [(name, child) for name, child in module.named_modules() if type(child) is nn.Dropout and child.p > 0]
    for name, child in found:
        module.set_submodule(name, SeededDropout(child.p, seed, name).train(child.training))
    return len(found)


def _current_keys() -> Tensor:
    assert _state.keys is not None and (_state.inside or _in_backward()), (
        "seeded dropout needs to know its samples: run a training forward within `dropout_keys(batch)`"
    )
    return _state.keys


def _in_backward() -> bool:
    """True while autograd runs: then a forward is the recomputation of a checkpointed one."""
    return bool(torch._C._current_graph_task_id() != -1)


def _mix64(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64, whose products wrap around."""
    z = (z ^ (z >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9, 64)
    z = (z ^ (z >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB, 64)
    return z ^ (z >> 31 & 2**33 - 1)


def _mix32_(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int32, in place.

    Its last shift is left out: it changes the low half only, which a comparison with a threshold hardly reads.
    """
    h.bitwise_xor_((h >> 16).bitwise_and_(2**16 - 1)).mul_(_signed(0x85EBCA6B, 32))
    return h.bitwise_xor_((h >> 13).bitwise_and_(2**19 - 1)).mul_(_signed(0xC2B2AE35, 32))


def _narrow(z: Tensor) -> Tensor:
    """The low 32 bits as int32, without relying on how a device casts what does not fit."""
    return ((z & 2**32 - 1) - 2**31).to(torch.int32)


def _signed(number: int, bits: int) -> int:
    """An unsigned constant as the signed integer of the same bits."""
    return number - (1 << bits) if number >> (bits - 1) else number
