"""What would make a run fit that does not: the nearest changes, each rehearsed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune import api
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_plugins.commands.plan.foreseen import Oracle, rows_of_a_rank
from loomtune_plugins.commands.plan.space import changed
from loomtune_plugins.commands.plan.worlds import World
from loomtune_plugins.planner.forecast import forecast
from loomtune_plugins.planner.search import Move, remedies

SECONDS = 120.0
"""That are spent on looking for remedies, beyond the one that is being tried."""


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that are changed, and by how much the world grows."""

    settings: tuple[tuple[str, Any], ...] = ()
    worlds: int = 1


def named(oracle: Oracle, plan: Plan, seconds: float = SECONDS) -> list[str]:
    """Up to three changes of a plan that make it fit, as they are typed, with what a rank then needs.

    plan: as it was rehearsed. An adapter, which makes another run of it, is named where no layout suffices.
    """
    peaks: dict[tuple[Move[Change], ...], int] = {}

    def fits(chosen: tuple[Move[Change], ...]) -> bool:
        settings = dict(sorted((pair for move in chosen for pair in move.change.settings), key=lambda pair: pair[0]))
        processes = plan.processes * max(move.change.worlds for move in chosen)
        try:
            other = changed(plan, settings, processes)
            api.check(other, simulated=True)
            trace = oracle.shallow(other, processes)
        except UserError:
            return False
        room = forecast(trace, other, installed(), rows=oracle.rows).room
        peaks[chosen] = room.peak
        return bool(room.fits)

    found = remedies(list(moves(plan, oracle.world)), fits, together=2, seconds=seconds)
    if not found and plan.chosen("adapter")["name"] != "lora" and "lora" in installed().names("adapter"):
        found = remedies([_set("adapter", "lora")], fits)  # another run, whose check takes its time
    return [f"{' '.join(move.label for move in chosen)} ({peaks[chosen] / 2**30:.1f} GiB)" for chosen in found]


def moves(plan: Plan, world: World) -> Iterator[Move[Change]]:
    """Single changes that save memory, those that cost least first."""
    sharding, nodes = plan.chosen("sharding"), max(1, world.nodes)
    micro, rows = plan.root.batch.micro, rows_of_a_rank(plan, plan.processes)
    if isinstance(micro, int):
        yield from (_set("batch.micro", count) for count in _halves(min(micro, rows)))
    if sharding.get("activation_checkpointing") is False:
        yield _set("sharding.activation_checkpointing", True)
    if sharding.get("accumulate_sharded") is False and rows > 1:
        yield _set("sharding.accumulate_sharded", True)
    if sharding.get("stage", 3) < 3:
        yield _set("sharding.stage", 3)
    yield from (_set("sharding.replicate", count) for count in _halves(sharding.get("replicate", 1)))
    if world.processes > 1 and "fsdp" in installed().names("sharding") and sharding["name"] in ("ddp", "single"):
        again = ("sharding.activation_checkpointing", sharding.get("activation_checkpointing", False))
        yield Move("sharding=fsdp", frozenset({"sharding"}), Change((("sharding", "fsdp"), again)))
    for count in (2, 4, 8):
        if sharding.get("sequence", count) < count <= world.per_node:
            yield _set("sharding.sequence", count)
    if sharding.get("name") != "single":
        yield _nodes(2 * nodes, 2)
    if (offload := {False: True, "none": "all", "optimizer": "all"}.get(sharding.get("offload", ""))) is not None:
        yield _set("sharding.offload", offload)
    if sharding.get("name") != "single":
        yield _nodes(4 * nodes, 4)


def _set(key: str, value: Any) -> Move[Change]:
    said = str(value).lower() if isinstance(value, bool) else value
    return Move(f"{key}={said}", frozenset({key}), Change(((key, value),)))


def _nodes(count: int, times: int) -> Move[Change]:
    return Move(f"launcher.nodes={count}", frozenset({"launcher.nodes"}), Change(worlds=times))


def _halves(number: int) -> Sequence[int]:
    found = []
    while number > 1:
        number //= 2
        found.append(number)
    return found
