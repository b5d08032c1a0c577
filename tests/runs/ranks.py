"""Processes of one world for one piece of work, with nothing that an earlier one has left."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loomtune.assembly import Assembly, assemble
from loomtune.catalogue import installed
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.world import World
from runs.worlds import PATIENCE, SERVER, free_port


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(world, *arguments)`, a function of a module, gives on every rank."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(size):
        here, there = SERVER.Pipe()
        mine = place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOOMTUNE_TIMEOUT_MINUTES": "9"}
        process = SERVER.Process(target=_serve, args=(there, mine, work, arguments), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        return [_answer(here) for _, here in ranks]
    finally:
        for process, here in ranks:
            process.kill()
            process.join()
            here.close()


def _serve(answer: Connection, place: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(place)
    from loomtune import world as worlds

    world = worlds.join()
    answer.send(work(world, *arguments))
    worlds.leave()


def _answer(rank: Connection) -> Any:
    assert rank.poll(PATIENCE), "a rank hangs"
    return rank.recv()


def assembled(world: World, folder: Path) -> Assembly:
    """The parts of the run of a prepared folder, as this rank has them; no model yet."""
    lease = Lease.take(folder) if world.leads else None
    attempt = world.broadcast(lease.attempt if lease else "")
    return assemble(Plan.load(folder), folder, installed(), world, Lease(folder, attempt))
