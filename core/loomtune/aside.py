"""Ranks that train nothing: the last ones of a world leave it before anything is built, and generate for the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from loomtune import world as worlds
from loomtune.assembly import assemble
from loomtune.catalogue import installed
from loomtune.contracts import Role, Rollout
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.world import World

if TYPE_CHECKING:
    from loomtune.peers import Peer


def part(plan: Plan, world: World, hosts: Sequence[Peer]) -> World:
    """The world without its last ranks; on each of those, one of its own. Every rank of the whole calls it.

    Both are default process groups with variables to match: no library sees that there are others.
    """
    training, store = plan.training(world.size), world.store
    assert store is not None, "a world of several met in a store"
    rank, size = (world.rank, training) if world.rank < training else (0, 1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    names = [f"rank {number} on {host.host}" for number, host in enumerate(hosts)]
    worlds.leave()
    parted = worlds.meet(World(rank, size, world.local_rank, world.device, store=dist.PrefixStore("training", store)))
    rollout: Rollout = plan.build(installed(), "rollout")
    return replace(parted, aside=rollout.connect(dist.PrefixStore("aside", store), world.rank, names))


def serve(plan: Plan, folder: Path, world: World, lease: Lease) -> dict[str, Any]:
    """What a rank aside does until the run ends: it builds the policy, as one process would, and generates.

    Gives the result of a rank of which nothing is to be told.
    """
    alone = replace(plan, settings={**plan.settings, "sharding": {"name": "single"}})
    assembly = assemble(alone, folder, installed(), world, lease, observed=False)
    rollout, wanted = assembly.run.rollout, assembly.run.objective.roles()["policy"]
    assert rollout is not None, "it asked for ranks"
    engine = assembly.sharding.engine(assembly.spec("policy", wanted, ("lm",)), world)
    rollout.serve(Role("policy", engine), world)
    return {"status": "completed", "step": 0, "metrics": {}, "error": None}
