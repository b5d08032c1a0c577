"""Buffers that are no part of a state dict, such as rotary tables, made anew after a birth without storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.errors import UserError

DONE = "_is_hf_initialized"


def restore(module: nn.Module) -> None:
    """Sets every such buffer of transformers' models, in place, as `from_pretrained` does; weights stay as they are.

    Raises UserError where a model's code does not say what a buffer holds.
    """
    for name, owner, part in _owned(module):
        buffers = {key: part._buffers.get(key) for key in sorted(part._non_persistent_buffers_set)}
        there = {key: buffer for key, buffer in buffers.items() if buffer is not None}
        if there and owner is not None:
            _rebuild(f"{name}.", owner, part, there)


def _rebuild(name: str, owner: Any, part: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Runs the model's own initialisation of a part, twice over other contents, which shows what it really sets."""
    results = []
    for content in (0, 1):
        for buffer in buffers.values():
            assert not buffer.is_meta, "buffers are restored after the module has storage"
            buffer.fill_(content)
        with torch.no_grad(), torch.device("cpu"), _shielded(part, buffers):
            owner._init_weights(part)
        results.append({key: buffer.clone() for key, buffer in buffers.items()})
    unset = [name + key for key in buffers if not torch.equal(results[0][key], results[1][key])]
    if unset:
        raise UserError.of(
            f"{type(owner).__name__} does not say what {', '.join(unset)} should hold",
            "choose a model whose code is part of transformers",
        )


@contextmanager
def _shielded(part: nn.Module, buffers: dict[str, Tensor]) -> Iterator[None]:
    """Marks all other tensors of a part as set, so that its initialisation leaves them alone."""
    ours = {id(buffer) for buffer in buffers.values()}
    others = [tensor for tensor in (*part.parameters(), *part.buffers()) if id(tensor) not in ours]
    marked = [tensor for tensor in others if not getattr(tensor, DONE, False)]
    hidden = [buffer for buffer in buffers.values() if getattr(buffer, DONE, False)]
    for tensor in marked:
        setattr(tensor, DONE, True)
    for buffer in hidden:
        setattr(buffer, DONE, False)
    try:
        yield
    finally:
        for tensor in marked:
            delattr(tensor, DONE)


def _owned(module: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """Every module with its name and the transformers model around it (None outside of one)."""
    owners: dict[str, Any] = {}
    for name, part in module.named_modules():
        above = owners.get(name.rpartition(".")[0]) if name else None
        owners[name] = part if hasattr(part, "_init_weights") and hasattr(part, "config") else above
        yield name, owners[name], part
