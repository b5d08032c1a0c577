"""Tensors that are described before they are read, so that a slice of one costs no more than itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from loomtune.contracts.sharding import Region

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def region(where: Region | None, shape: Sequence[int]) -> Region:
    """A slice for every dimension, with start and stop inside the shape. where: None for all of it."""
    given = where or ()
    full = [*given, *[slice(None)] * (len(shape) - len(given))]
    bounds = (part.indices(size) for part, size in zip(full, shape, strict=True))
    return tuple(slice(start, max(start, stop), step) for start, stop, step in bounds)


class Piece(ABC):
    """A tensor that can be read in part."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, where: Region) -> Tensor:
        """The part of it, on the CPU. where: as `region` gives it."""


class Stored(Piece):
    """A tensor of a file. shape: as the file says, without reading it."""

    def __init__(self, file: OpenFile, name: str) -> None:
        self._file, self._name = file, name
        self.shape = tuple(file.handle.get_slice(name).get_shape())

    def read(self, where: Region) -> Tensor:
        """Reads no more of the file than the rows asked for, and lets go of it: what is mapped counts as memory."""
        handle = self._file.handle
        self._file.close()
        with torch.device("cpu"):  # a birth on the meta device would reach into safetensors
            if all(part == slice(0, size, 1) for part, size in zip(where, self.shape, strict=True)):
                whole: Tensor = handle.get_tensor(self._name)
                return whole
            part: Tensor = handle.get_slice(self._name)[where]
            return part.contiguous()


class Joined(Piece):
    """Tensors one after the other along a dimension."""

    def __init__(self, parts: Sequence[Piece], dim: int) -> None:
        self._parts, self._dim = parts, dim
        first = parts[0].shape
        self.shape = (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])

    def read(self, where: Region) -> Tensor:
        """Reads only the parts that the region meets."""
        found: list[Tensor] = []
        dim, begin = self._dim, 0
        for part in self._parts:
            size = part.shape[dim]
            start, stop = max(where[dim].start - begin, 0), min(where[dim].stop - begin, size)
            begin += size
            if start < stop or (not found and part is self._parts[-1]):
                found.append(part.read((*where[:dim], slice(start, max(start, stop), 1), *where[dim + 1 :])))
        return torch.cat(found, dim=dim)


class Stacked(Piece):
    """Tensors of one shape along a new first dimension: the experts of a layer."""

    def __init__(self, parts: Sequence[Piece]) -> None:
        self._parts = parts
        self.shape = (len(parts), *parts[0].shape)

    def read(self, where: Region) -> Tensor:
        """Reads only the parts that the region meets."""
        chosen = self._parts[where[0]]
        if not chosen:
            return self._parts[0].read(where[1:])[None][:0]
        return torch.stack([part.read(where[1:]) for part in chosen])


class OpenFile:
    """A safetensors file, opened when first needed and mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """What `safe_open` gives."""
        if self._handle is None:
            self._handle = safe_open(self._path, framework="pt", device="cpu")
        return self._handle

    def close(self) -> None:
        """Lets go of the file; it is opened again when needed."""
        self._handle = None
