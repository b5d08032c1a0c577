"""What a checkpoint says about itself: which files, with which digests, and where every tensor lies in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from loomtune.checkpoint.files import Written, write_bytes
from loomtune.contracts.optimizer import StateKind
from loomtune.errors import CheckpointError

FORMAT = "loomtune-checkpoint"
VERSION = 1
NAME = "manifest.json"
HEAD = ("run", "attempt", "step", "world_size")

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A box of a tensor, `offset` to `offset + extent`, and the file that holds it."""

    file: str
    offset: Shape
    extent: Shape


class Entry(NamedTuple):
    """Where a tensor is. key: its name in every file that has a piece. shape: of the whole tensor.

    pieces: none where the optimizer declares the tensor and had not made it yet, which is not to be lost.
    """

    key: str
    shape: Shape
    dtype: str
    kind: StateKind
    pieces: list[Piece]


def nothing(key: str) -> Entry:
    """The entry of a tensor that is still to be made."""
    return Entry(key, (), "", StateKind.SCALAR, [])


Index = dict[tuple[str, str, str], Entry]
"""(role, parameter, tensor) -> where it is."""


def merge(indices: Iterable[Index]) -> Index:
    """One index from those of all ranks. Raises CheckpointError where they do not speak of the same tensor."""
    whole: Index = {}
    for name, entry in (item for index in indices for item in index.items()):
        known = whole.get(name)
        if known is None or not known.pieces:
            whole[name] = entry._replace(pieces=list(entry.pieces))
            continue
        if not entry.pieces:
            continue
        if known[:-1] != entry[:-1]:
            raise CheckpointError(f"ranks disagree about {'/'.join(name)}: {known} and {entry}")
        # Every rank that has a part of a parameter has its scalars too; one of them is enough.
        if entry.kind is not StateKind.SCALAR:
            known.pieces.extend(entry.pieces)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The last file of a checkpoint to be written; a folder without a valid one is not a checkpoint.

    run: the run's id (the hash of its plan). step: optimizer steps done. files: by path relative to the folder.
    """

    run: str
    attempt: str
    step: int
    world_size: int
    files: dict[str, Written]
    index: Index

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` through to the disk, sealed with a digest of itself."""
        tensors: dict[str, dict[str, dict[str, Any]]] = {}
        for (role, parameter, tensor), entry in self.index.items():
            tensors.setdefault(role, {}).setdefault(parameter, {})[tensor] = entry._asdict()
        head = {"format": FORMAT, "version": VERSION} | {name: getattr(self, name) for name in HEAD}
        body = head | {"tensors": tensors, "files": {name: file._asdict() for name, file in self.files.items()}}
        write_bytes(folder / NAME, json.dumps({"sha256": _seal(body), **body}).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint. Raises CheckpointError where there is none, or not one that we wrote."""
        try:
            body = json.loads((folder / NAME).read_bytes())
            if body.pop("sha256") != _seal(body):
                raise CheckpointError(f"{folder / NAME} is damaged: its own digest does not fit")
            if (body["format"], body["version"]) != (FORMAT, VERSION):
                raise CheckpointError(f"{folder} has format {body['format']} {body['version']}, not {FORMAT} {VERSION}")
            return cls._from(body)
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is not a checkpoint: it has no {NAME}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / NAME} cannot be read: {type(error).__name__}: {error}") from error

    @classmethod
    def _from(cls, body: dict[str, Any]) -> Manifest:
        for name in body["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name} lies outside the checkpoint")
        index = {
            (role, parameter, tensor): _entry(**entry)
            for role, parameters in body["tensors"].items()
            for parameter, entries in parameters.items()
            for tensor, entry in entries.items()
        }
        files = {name: Written(**file) for name, file in body["files"].items()}
        if unknown := {piece.file for entry in index.values() for piece in entry.pieces} - files.keys():
            raise ValueError(f"it lists no {min(unknown)}, in which tensors should be")
        head = {name: body[name] for name in HEAD}
        return cls(**head, files=files, index=index)


def _seal(body: dict[str, Any]) -> str:
    """Digest of the content, so that a flipped bit in an offset is noticed as one in a tensor is."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entry(key: str, shape: list[int], dtype: str, kind: str, pieces: list[Any]) -> Entry:
    boxes = [Piece(file, tuple(offset), tuple(extent)) for file, offset, extent in pieces]
    return Entry(key, tuple(shape), dtype, StateKind(kind), boxes)
