"""A rank's share of a checkpoint, copied to CPU memory so that training may go on changing the tensors in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loomtune.checkpoint.files import TYPES
from loomtune.checkpoint.manifest import Entry, Index, Piece, nothing
from loomtune.checkpoint.memory import Passing, give_back
from loomtune.contracts.adapter import Adapter
from loomtune.contracts.optimizer import StateKind
from loomtune.contracts.saved import HEADS, HEADS_FILE, weight_files
from loomtune.contracts.sharding import Engine, ParameterShard
from loomtune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """What other programs can load of a checkpoint: the model's folder where all of it is trained, else the adapter's.

    role: whose engine it is. base: path or id of the base model. describe: writes config and tokenizer to a folder.
    """

    role: str
    adapter: Adapter
    base: str
    describe: Callable[[Path], None]

    @property
    def folder(self) -> str:
        """Its name within the checkpoint."""
        return "model" if self.adapter.saves_base else "adapter"


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


def take(
    engines: Mapping[str, Engine], servable: Servable | None, kinds: Mapping[str, StateKind], world: World
) -> Snapshot:
    """Copies this rank's share of the engines, by role. Collective where something is servable, else local.

    What is written whole for other programs is the checkpoint's own copy too: it is not stored again in parts.
    kinds: what the optimizer declares.
    """
    give_back()  # what the steps before have freed; the copies need it
    snapshot = Snapshot()
    whole: set[str] = set()
    if servable and servable.adapter.saves_base:
        whole = _take_model(snapshot, engines[servable.role], servable, world)
    elif servable:
        whole = _take_added(snapshot, engines[servable.role], servable, world)
    for role, engine in engines.items():
        _take_parts(snapshot, role, engine, whole if servable and role == servable.role else set(), kinds, world.rank)
    return snapshot


def _take_model(snapshot: Snapshot, engine: Engine, servable: Servable, world: World) -> set[str]:
    """Shares out the whole tensors by bytes, each to the rank with the fewest so far, as they stream by."""
    loads = [0] * world.size
    owners: dict[str, int] = {}
    mine: dict[str, tuple[str, Tensor]] = {}
    streamed: set[str] = set()
    passing = Passing()
    for name, tensor in engine.stream_weights():
        passing.count(tensor)
        if _took_head(snapshot, name, tensor, servable, world):
            streamed.add(name)
        elif (key := servable.adapter.base_name(name)) is not None:
            streamed.add(name)
            owners[key] = loads.index(min(loads))
            loads[owners[key]] += tensor.nbytes
            if owners[key] == world.rank:
                mine[name] = key, _copy(tensor)
    files = weight_files(1 + max(owners.values(), default=0))
    snapshot.model_bytes = sum(loads)
    snapshot.placed = {key: files[owner] for key, owner in owners.items()}
    for name, (key, tensor) in mine.items():
        _add_whole(snapshot, servable.role, name, key, tensor, f"model/{snapshot.placed[key]}")
    return streamed


def _take_added(snapshot: Snapshot, engine: Engine, servable: Servable, world: World) -> set[str]:
    """What `Adapter.save` needs, on the one rank that calls it; all ranks stream, for that is collective."""
    trained = engine.trained()
    heads: set[str] = set()
    for name, tensor in engine.stream_weights(lambda name: name in trained or servable.adapter.base_name(name) is None):
        if _took_head(snapshot, name, tensor, servable, world):
            heads.add(name)
        elif world.leads:
            snapshot.added[name] = _copy(tensor)
    return heads


def _took_head(snapshot: Snapshot, name: str, tensor: Tensor, servable: Servable, world: World) -> bool:
    """True for a scalar head, which lies beside the weights under the name that a `WeightSource` knows it by."""
    if name.startswith(HEADS) and world.leads:
        _add_whole(snapshot, servable.role, name, name, _copy(tensor), f"{servable.folder}/{HEADS_FILE}")
    return name.startswith(HEADS)


def _add_whole(snapshot: Snapshot, role: str, name: str, key: str, tensor: Tensor, file: str) -> None:
    shape = tuple(tensor.shape)
    entry = Entry(key, shape, TYPES[tensor.dtype], StateKind.LIKE, [Piece(file, (0,) * tensor.ndim, shape)])
    snapshot.add((role, name, "weight"), entry, tensor)


def _take_parts(
    snapshot: Snapshot, role: str, engine: Engine, whole: set[str], kinds: Mapping[str, StateKind], rank: int
) -> None:
    boxes: Counter[str] = Counter()
    for shard in engine.shards():
        # A key is once in a file: the second box of a parameter goes into a second file, and so on.
        file = f"optimizer/{role}-{rank:05d}{f'.{boxes[shard.name]}' if boxes[shard.name] else ''}.safetensors"
        boxes[shard.name] += 1
        for tensor_name, kind in {"weight": StateKind.LIKE, **kinds}.items():
            if tensor_name == "weight" and shard.name in whole:
                continue
            name, key = (role, shard.name, tensor_name), f"{shard.name}/{tensor_name}"
            if (tensor := shard.tensors.get(tensor_name)) is None:
                snapshot.index.setdefault(name, nothing(key))
                continue
            snapshot.add(name, _part(shard, key, tensor, kind, file), _copy(tensor))
        undeclared = shard.tensors.keys() - {"weight", *kinds}
        assert not undeclared, f"{shard.name} has {sorted(undeclared)}, which its optimizer does not declare"


def _part(shard: ParameterShard, key: str, tensor: Tensor, kind: StateKind, file: str) -> Entry:
    if kind is StateKind.SCALAR:
        return Entry(key, (), TYPES[tensor.dtype], kind, [Piece(file, (), ())])
    extent = tuple(shard.tensors["weight"].shape)
    fits = kind is StateKind.OPAQUE or tuple(tensor.shape) == extent
    assert fits, f"{key} is declared to be like its parameter: it has shape {tuple(tensor.shape)}, the part {extent}"
    return Entry(key, shard.shape, TYPES[tensor.dtype], kind, [Piece(file, shard.offset, extent)])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
