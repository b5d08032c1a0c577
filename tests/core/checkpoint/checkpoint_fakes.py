"""Engines that are dictionaries cut in parts, adapters that know two kinds of names, and ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from loomtune.checkpoint import Saver, Servable
from loomtune.contracts import ParameterShard, StateKind

Network = dict[str, dict[str, Tensor]]
KINDS = {
    "exp_avg": StateKind.LIKE,
    "exp_avg_sq": StateKind.LIKE,
    "step": StateKind.SCALAR,
    "quantised": StateKind.OPAQUE,
}
Cut = Callable[[tuple[int, ...]], tuple[slice, ...] | None]


def network(seed: int = 0) -> Network:
    """Parameters with AdamW's state; sizes that no number of ranks divides, and one parameter without dimensions."""
    made: Network = {}
    draw = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (7, 3), "block.weight": (5, 4, 2), "norm.bias": (11,), "scale": ()}
    for name, shape in shapes.items():
        made[name] = {key: torch.randn(shape, generator=draw) for key in ("weight", "exp_avg", "exp_avg_sq")}
        made[name]["step"] = torch.tensor(float(seed + 3))
    made["embed.weight"]["exp_avg"] = made["embed.weight"]["exp_avg"].bfloat16()
    return made


def rows(rank: int, sizes: list[int]) -> Cut:
    """Cuts the first dimension in proportion to `sizes`, one a rank; what has no dimension belongs to rank 0."""

    def cut(shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        if not shape:
            return () if rank == 0 else None
        begin, end = (shape[0] * sum(sizes[:upto]) // sum(sizes) for upto in (rank, rank + 1))
        return (slice(begin, end), *(slice(0, size) for size in shape[1:]))

    return cut


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


class FakeEngine:
    """What checkpoints use of an engine."""

    def __init__(self, tensors: Network, cut: Cut = whole, buffers: dict[str, Tensor] | None = None) -> None:
        self.tensors, self.cut, self.buffers = tensors, cut, buffers or {}

    def shards(self) -> Iterator[ParameterShard]:
        for name, tensors in self.tensors.items():
            shape = tuple(tensors["weight"].shape)
            if (region := self.cut(shape)) is None:
                yield ParameterShard(name, shape, (), {})
                continue
            parts = {key: tensor[region] if tuple(tensor.shape) == shape else tensor for key, tensor in tensors.items()}
            yield ParameterShard(name, shape, tuple(part.start for part in region), parts)

    def stream_weights(self, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        whole = {name: tensors["weight"] for name, tensors in self.tensors.items()} | self.buffers
        yield from ((name, tensor) for name, tensor in whole.items() if wanted is None or wanted(name))

    def trained(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensors["weight"].shape) for name, tensors in self.tensors.items()}

    def read(self, reader: Callable[..., Tensor]) -> Network:
        """This rank's part of everything, as an engine under this cut would load it."""
        loaded: Network = {}
        for name, tensors in self.tensors.items():
            shape = tuple(tensors["weight"].shape)
            if (region := self.cut(shape)) is None:
                continue
            likes = {key: tuple(tensor.shape) == shape for key, tensor in tensors.items()}
            loaded[name] = {key: reader(name, key, region if like else None) for key, like in likes.items()}
        return loaded


class FakeAdapter:
    """Trains all, or only what is called lora."""

    def __init__(self, saves_base: bool) -> None:
        self.saves_base = saves_base

    def base_name(self, name: str) -> str | None:
        return None if "lora" in name else name.removeprefix("woven.")

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        (folder / "adapter_config.json").write_text(base)
        (folder / "names.txt").write_text(" ".join(name for name, _ in tensors))


def full(role: str = "policy", describe: Callable[[Path], Any] = lambda folder: None) -> Servable:
    return Servable(role=role, adapter=FakeAdapter(True), base="base", describe=describe)


class Alone:
    """The world of one rank."""

    rank, size, leads = 0, 1, True

    def gather(self, thing: Any) -> list[Any]:
        return [thing]

    def broadcast(self, thing: Any) -> Any:
        return thing


class ThreadWorld:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: Barrier, board: list[Any]) -> None:
        self.rank, self.size, self.leads = rank, size, rank == 0
        self._barrier, self._board = barrier, board

    def gather(self, thing: Any) -> list[Any]:
        self._board[self.rank] = thing
        self._barrier.wait(60)
        things = list(self._board)
        self._barrier.wait(60)
        return things

    def broadcast(self, thing: Any) -> Any:
        return self.gather(thing)[0]


def on_ranks(size: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """Runs `work(world)` on as many ranks; gives what each returned, or the exception that it raised."""
    barrier, board = Barrier(size), [None] * size

    def run(rank: int) -> Any:
        try:
            return work(ThreadWorld(rank, size, barrier, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def saver(folder: Path, world: Any = None, **more: Any) -> Saver:
    settings = {"background": False, "kinds": KINDS, **more}
    return Saver(folder, world or Alone(), run="run-hash", attempt="a1", **settings)


def save(folder: Path, step: int, engine: FakeEngine | None = None, **more: Any) -> Path:
    """A checkpoint of one rank, written and committed."""
    one = saver(folder, **more)
    one.start(step, {"policy": engine or FakeEngine(network(step))}, {"samples": step * 8})  # type: ignore[dict-item]
    path = one.finish()
    assert path is not None
    return path


def equal(one: Network, other: Network) -> bool:
    """Bit for bit, types included."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(
            one[name][key].dtype == other[name][key].dtype and torch.equal(one[name][key], other[name][key])
            for key in one[name]
        )
        for name in one
    )
