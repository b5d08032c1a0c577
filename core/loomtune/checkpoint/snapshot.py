"""A rank's share of a checkpoint, copied to CPU memory so that training may go on changing the tensors in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loomtune.checkpoint.files import TYPES
from loomtune.checkpoint.manifest import Entry, Index, Piece, Shape
from loomtune.contracts.adapter import Adapter
from loomtune.contracts.optimizer import StateKind
from loomtune.contracts.sharding import Engine
from loomtune.world import World

HEADS = "heads."
"""How names of scalar heads begin (`toolkit.network`). Hugging Face's loaders know none: they stay out of `model/`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """What other programs can load of a checkpoint: the model's folder where all of it is trained, else the adapter's.

    role: whose engine it is. base: path or id of the base model. describe: writes config and tokenizer to a folder.
    """

    role: str
    adapter: Adapter
    base: str
    describe: Callable[[Path], None]


@dataclass(slots=True)
class Snapshot:
    """Copies, and where they will lie.

    files: tensors by key, by file. placed: file in `model/` by key, of all ranks. added: for `Adapter.save` (rank 0).
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    index: Index = field(default_factory=dict)
    placed: dict[str, str] = field(default_factory=dict)
    model_bytes: int = 0
    added: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: tuple[str, str, str], entry: Entry, tensor: Tensor) -> None:
        """Takes a tensor, or another box of it: the entry's one piece. A scalar is the same with every box."""
        known = self.index.setdefault(name, entry)
        if known is not entry and entry.kind is StateKind.SCALAR:
            return
        if known is not entry:
            known.pieces.extend(entry.pieces)
        self.files.setdefault(entry.pieces[0].file, {})[entry.key] = tensor


def take(engines: Mapping[str, Engine], servable: Servable | None, world: World) -> Snapshot:
    """Copies this rank's share of the engines, by role. Collective where something is servable, else local.

    Whole weights in `model/` are the weights of the checkpoint: they are not stored again in parts.
    """
    snapshot = Snapshot()
    whole: set[str] = set()
    if servable and servable.adapter.saves_base:
        whole = _take_model(snapshot, engines[servable.role], servable, world)
    elif servable:
        _take_added(snapshot, engines[servable.role], servable, world)
    for role, engine in engines.items():
        _take_parts(snapshot, role, engine, whole if servable and role == servable.role else set(), world.rank)
    return snapshot


def _take_model(snapshot: Snapshot, engine: Engine, servable: Servable, world: World) -> set[str]:
    """Shares out the whole tensors by bytes, each to the rank with the fewest so far, as they stream by."""
    loads = [0] * world.size
    owners: dict[str, int] = {}
    mine: dict[str, tuple[str, Tensor]] = {}
    streamed: set[str] = set()
    for name, tensor in engine.stream_weights():
        if name.startswith(HEADS) or (key := servable.adapter.base_name(name)) is None:
            continue
        streamed.add(name)
        owners[key] = loads.index(min(loads))
        loads[owners[key]] += tensor.nbytes
        if owners[key] == world.rank:
            mine[name] = key, _copy(tensor)
    files = _model_files(1 + max(owners.values(), default=0))
    snapshot.model_bytes = sum(loads)
    snapshot.placed = {key: files[owner] for key, owner in owners.items()}
    for name, (key, tensor) in mine.items():
        shape = tuple(tensor.shape)
        piece = Piece(f"model/{snapshot.placed[key]}", (0,) * tensor.ndim, shape)
        entry = Entry(key, shape, TYPES[tensor.dtype], StateKind.LIKE, [piece])
        snapshot.add((servable.role, name, "weight"), entry, tensor)
    return streamed


def _take_added(snapshot: Snapshot, engine: Engine, servable: Servable, world: World) -> None:
    """What `Adapter.save` needs, on the one rank that calls it; all ranks stream, for that is collective."""
    trained = engine.trained()
    for name, tensor in engine.stream_weights(lambda name: name in trained or servable.adapter.base_name(name) is None):
        if world.leads:
            snapshot.added[name] = _copy(tensor)


def _take_parts(snapshot: Snapshot, role: str, engine: Engine, whole: set[str], rank: int) -> None:
    boxes: Counter[str] = Counter()
    for shard in engine.shards():
        # A key is once in a file: the second box of a parameter goes into a second file, and so on.
        file = f"optimizer/{role}-{rank:05d}{f'.{boxes[shard.name]}' if boxes[shard.name] else ''}.safetensors"
        boxes[shard.name] += 1
        for tensor_name, tensor in shard.tensors.items():
            if tensor_name == "weight" and shard.name in whole:
                continue
            extent = tuple(shard.tensors["weight"].shape)
            kind = _kind(tensor, extent)
            box = ((), ()) if kind is StateKind.SCALAR else (shard.offset, extent)
            shape = () if kind is StateKind.SCALAR else shard.shape
            entry = Entry(f"{shard.name}/{tensor_name}", shape, TYPES[tensor.dtype], kind, [Piece(file, *box)])
            snapshot.add((role, shard.name, tensor_name), entry, _copy(tensor))


def _kind(tensor: Tensor, extent: Shape) -> StateKind:
    if tuple(tensor.shape) == extent:
        return StateKind.LIKE
    return StateKind.OPAQUE if tensor.ndim else StateKind.SCALAR


def _model_files(count: int) -> list[str]:
    """The names that Hugging Face gives to the files of a model in one or more parts."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
