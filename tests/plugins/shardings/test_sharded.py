"""What of fully sharded parameters stays gathered between passes, and in which groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _world as registered

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Batch, Role
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from ranks import together
from toys import sample

KEPT: list[Any] = [False, 2]
"""Settings of `reshard` that keep a block's parameters after its forward pass: whole, or in groups."""


def here(reshard: Any) -> tuple[Any, World]:
    """The strategy and this rank's place."""
    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    return installed().build("sharding", "fsdp", {"reshard": reshard}), world


def rows(*texts: str) -> Batch:
    return collate([sample(text) for text in texts], range(len(texts)), toy.ToyTokenizer.pad_id)


def read(engine: Any, text: str, *, trained: bool = True) -> Tensor:
    return log_probs(Role("policy", engine, trained=trained), rows(text))


def gathered(engine: Any) -> list[str]:
    """The parameters of which this rank has more than its own part."""
    return [name for name, parameter in engine.network.named_parameters() if parameter is not engine.named[name]]


def loaded(reshard: Any) -> list[bool]:
    """Whether a pass before left something, and whether the one after other weights were read is of those."""
    sharding, world = here(reshard)
    engine, other = (sharding.engine(dataclasses.replace(toy.spec(), seed=seed), world) for seed in (1, 2))
    whole = dict(other.stream_weights())
    with torch.no_grad():
        before, expected = read(engine, "warp"), read(other, "warp")
        left = "module.blocks.0.project.weight" in gathered(engine)
        engine.load(lambda name, key, at: whole[name] if at is None else whole[name][at], optimizer=False)
        after = read(engine, "warp")
    return [left, torch.equal(after, expected), not torch.equal(after, before)]


def frozen(reshard: Any) -> list[str]:
    """What a role that is only read has left gathered, though nothing but its forward was called."""
    sharding, world = here(reshard)
    engine = sharding.engine(toy.spec(trained=False), world)
    with torch.no_grad():
        engine.forward(rows("warp"), lambda view: view.states)
    return gathered(engine)


def interrupted(reshard: Any) -> list[bool]:
    """Whether an evaluation between forward and backward pass leaves nothing gathered, and the gradients alike."""
    sharding, world = here(reshard)
    found, gradients = [], []
    for evaluates in (False, True):
        engine = sharding.engine(toy.spec(), world)
        with engine.accumulating(last=True):
            value = read(engine, "warp")
            if evaluates:
                read(engine, "a longer weft", trained=False)
                found.append(not gathered(engine))
            engine.backward(-value.sum())
        gradients.append({name: engine.layout.full(p.grad) for name, p in engine.trainable.items()})
    return [*found, all(torch.equal(tensor, gradients[1][name]) for name, tensor in gradients[0].items())]


def groups() -> list[int]:
    """Process groups that two roles of two blocks each make, beyond the one of all ranks."""
    sharding, world = here(2)
    made, before = [], len(registered.pg_map)
    for _ in range(2):
        engine = sharding.engine(toy.spec(), world)
        engine.backward(-read(engine, "warp").sum())
        made.append(len(registered.pg_map) - before)
    return made


def kept() -> dict[str, Any]:
    """All of it, in one world."""
    found: dict[str, Any] = {"groups": groups()}
    for reshard in KEPT:
        found[f"loaded {reshard}"] = loaded(reshard)
        found[f"frozen {reshard}"] = frozen(reshard)
        found[f"interrupted {reshard}"] = interrupted(reshard)
    return found


def test_what_stays_gathered_is_freed_before_it_is_stale_and_all_blocks_share_its_groups(tmp_path: Path) -> None:
    for found in together(4, tmp_path, kept):
        # A rank is in two: of the two that it shares a block's parameters with, and of the two that have the same part.
        assert found["groups"] == [2, 2], "more blocks and more roles make no more groups"
        for reshard in KEPT:
            assert found[f"loaded {reshard}"] == [True, True, True]
            assert found[f"frozen {reshard}"] == []
            assert found[f"interrupted {reshard}"] == [True, True]
