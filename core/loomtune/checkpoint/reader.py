"""Reading any region of any tensor of a checkpoint, whatever layout it was written under."""

from __future__ import annotations

import json
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loomtune.checkpoint.files import TYPES
from loomtune.checkpoint.folder import cure, validate, verify
from loomtune.checkpoint.manifest import Entry, Piece
from loomtune.checkpoint.memory import Passing
from loomtune.contracts.optimizer import StateKind
from loomtune.contracts.sharding import Region, StateReader
from loomtune.errors import CheckpointError
from loomtune.world import World


class MissingTensorError(CheckpointError, KeyError):
    """A checkpoint says that there was no such tensor yet: state that an optimizer makes in some step only. A KeyError
    too, by which engines know that they begin it anew."""

    __str__ = Exception.__str__


DTYPES = {name: dtype for dtype, name in TYPES.items()}
Box = list[tuple[int, int]]
"""Begin and end along each dimension."""


class Reader:
    """An open checkpoint. No byte of it is used before its file's sha256 was compared.

    world: where given, the ranks share the comparing out and all of them raise what one of them finds (collective);
    otherwise each file is compared before the first read from it. Files are held open until `close`.
    """

    def __init__(self, path: Path, world: World | None = None) -> None:
        self.path = path
        self.manifest = validate(path)
        self._verified: set[str] = set()
        self._open: dict[str, Any] = {}
        self._passing = Passing()
        if world is not None:
            self._verify_together(world)

    def close(self) -> None:
        """Lets go of the files; what is read afterwards opens them again."""
        self._open.clear()  # a handle closes when nobody has it

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """What the loop passed to `Saver.start`."""
        self._verify("state.json")
        return dict(json.loads((self.path / "state.json").read_text()))

    def read(self, role: str) -> StateReader:
        """Reads the tensors of a role: what `Engine.load` takes."""
        return partial(self._read, role)

    def _read(self, role: str, parameter: str, tensor: str, region: Region | None) -> Tensor:
        """Only the bytes of the region are read. Raises CheckpointError where they are not all there, as
        MissingTensorError where the checkpoint says that there was no such tensor when it was made."""
        name = f"{tensor} of {role}'s {parameter}"
        entry = self.manifest.index.get((role, parameter, tensor))
        if entry is None or not entry.pieces:
            kind = MissingTensorError if entry else CheckpointError
            raise kind(f"{self.path} holds no {name}{self._instead(role, parameter)}")
        where = _box(entry, region, name)
        if entry.kind is StateKind.OPAQUE:
            return self._opaque(entry, where, name)
        values = self._passing.count(torch.empty([end - begin for begin, end in where], dtype=DTYPES[entry.dtype]))
        missing = torch.ones(values.shape, dtype=torch.bool)
        for piece in entry.pieces:
            overlap = _overlap(piece, where)
            if prod(end - begin for begin, end in overlap) == 0:
                continue
            there = _slices(overlap, [begin for begin, _ in where])
            if not missing[there].all():
                raise CheckpointError(f"{self.path}: two pieces of {name} overlap{cure(self.path)}")
            values[there] = self._fetch(piece, entry.key, _slices(overlap, piece.offset))
            missing[there] = False
        if missing.any():
            raise CheckpointError(f"{self.path} holds only some of {name}: {region} is not covered{cure(self.path)}")
        return values

    def _opaque(self, entry: Entry, where: Box, name: str) -> Tensor:
        for piece in entry.pieces:
            if _overlap(piece, where) == where and piece.extent == tuple(end - begin for begin, end in where):
                return self._fetch(piece, entry.key, None)
        raise CheckpointError(
            f"{name} can be read only under the layout that wrote it ({self.manifest.world_size} ranks)"
            "\n    cure: resume with the same sharding and number of processes, or begin a new run from what it holds, "
            "model/ (model.path) or adapter/ (adapter.path)"
        )

    def _fetch(self, piece: Piece, key: str, inside: Region | None) -> Tensor:
        if piece.file not in self._open:
            self._verify(piece.file)
            self._open[piece.file] = safe_open(self.path / piece.file, framework="pt")
        file = self._open[piece.file]
        return file.get_slice(key)[inside] if inside else file.get_tensor(key)  # type: ignore[no-any-return]

    def _verify(self, name: str) -> None:
        if name not in self._verified:
            verify(self.path, name, self.manifest)
            self._verified.add(name)

    def _verify_together(self, world: World) -> None:
        loads, error = [0] * world.size, ""
        for name, file in self.manifest.files.items():
            checker = loads.index(min(loads))
            loads[checker] += file.bytes + 1
            try:
                if checker == world.rank:
                    verify(self.path, name, self.manifest)
            except (CheckpointError, OSError) as caught:
                error = error or str(caught)
        if errors := [message for message in world.gather(error) if message]:
            raise CheckpointError("\n".join(errors))
        self._verified.update(self.manifest.files)

    def _instead(self, role: str, parameter: str) -> str:
        index = self.manifest.index
        held = [t for (r, p, t), entry in index.items() if (r, p) == (role, parameter) and entry.pieces]
        held = held or sorted({r for r, _, _ in index})
        return f"; what it holds there: {', '.join(held)}\n    cure: keep the run's model, adapter and optimizer"


def _box(entry: Entry, region: Region | None, name: str) -> Box:
    """The region as numbers; all of the tensor where there is none."""
    region = region or tuple(slice(None) for _ in entry.shape)
    assert len(region) == len(entry.shape), f"a region of {len(region)} dimensions of {name}, which has {entry.shape}"
    assert all(cut.step in {None, 1} for cut in region), f"a region of {name} with a step"
    return [cut.indices(size)[:2] for cut, size in zip(region, entry.shape, strict=True)]


def _overlap(piece: Piece, where: Box) -> Box:
    """What a piece and a box have in common; where that is nothing, an end may lie at its begin, not before."""
    ranges = zip(where, piece.offset, piece.extent, strict=True)
    cuts = ((max(begin, at), min(end, at + size)) for (begin, end), at, size in ranges)
    return [(begin, max(begin, end)) for begin, end in cuts]


def _slices(box: Box, origin: tuple[int, ...] | list[int]) -> Region:
    return tuple(slice(begin - at, end - at) for (begin, end), at in zip(box, origin, strict=True))
