"""`loomtune plan --search`: what fits, best first, and the fewest accelerators that can do it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune import api
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_plugins.commands.plan import space
from loomtune_plugins.commands.plan.described import FORMAT, arithmetic, span
from loomtune_plugins.commands.plan.foreseen import Oracle
from loomtune_plugins.commands.plan.worlds import World, sizes
from loomtune_plugins.planner.forecast import Forecast, forecast
from loomtune_plugins.planner.search import Candidate, Found, Outcome, Search, Tried, fewest

COUNTS = ("candidates", "tried", "cannot_fit", "cannot_be_better", "left_out")
"""Of `Found`: what became of the configurations."""

SHOWN = 8
"""Configurations that are ranked."""


@dataclass(frozen=True, slots=True)
class Least:
    """The fewest ranks that can do it. tried: how. arithmetic: of its memory, rehearsed with every check."""

    tried: Tried
    arithmetic: Sequence[Mapping[str, Any]]


class Evaluator:
    """From a candidate to what it comes to, by a rehearsal."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def __call__(self, candidate: Candidate) -> Outcome:
        try:
            plan = self.plan(candidate)
            api.check(plan, simulated=True)
            trace = self.oracle.shallow(plan, candidate.processes)
            return outcome(forecast(trace, plan, installed(), rows=self.oracle.rows), plan)
        except UserError as error:
            return Outcome(reason=error.faults[0].what)
        except Exception as error:  # one that cannot be rehearsed must not take the others with it
            return Outcome(reason=f"cannot be rehearsed: {type(error).__name__}: {error}")

    def plan(self, candidate: Candidate) -> Plan:
        """The candidate as a plan."""
        return space.changed(self.oracle.plan, dict(candidate.settings), candidate.processes)


def outcome(made: Forecast, plan: Plan) -> Outcome:
    """What the search needs of a forecast."""
    room, seconds, price = made.room, made.speed.seconds, plan.root.hardware.price
    hours = plan.processes / 3600
    return Outcome(
        bytes=room.peak,
        capacity=room.capacity or 0,
        host_bytes=room.host,
        host_capacity=room.host_capacity or 0,
        seconds=seconds,
        tokens_per_second=made.speed.rate,
        usd=(seconds[0] * hours * price, seconds[1] * hours * price) if seconds and price else None,
        detail=made,
    )


def searched(oracle: Oracle, options: argparse.Namespace) -> int:
    """Searches, prints, draws. 0 where something fits."""
    if not oracle.plan.root.hardware.memory_gib:
        raise UserError.of("--search asks what fits, and no hardware is named", "add hardware=h100_80gb, say")
    axes = space.asked(options.search)
    found = Seeker(oracle, axes, options.by, options.seconds).seek()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        from loomtune_plugins.commands.plan.shown import show_search

        show_search(found)
    if options.picture:
        from loomtune_plugins.commands.plan.picture import frontier

        options.picture.write_text(frontier(found))
    return 0 if found["groups"][0]["ranked"] else 1


class Seeker:
    """One search. axes: that are searched. by: what is least for the best. seconds: that it may take."""

    def __init__(self, oracle: Oracle, axes: Sequence[str], by: str, seconds: float) -> None:
        self.oracle, self.axes, self.by = oracle, axes, by
        evaluate = Evaluator(oracle)
        self.evaluator = evaluate
        self.search = Search(evaluate, space.slower(oracle.plan), by=by, best=SHOWN, seconds=seconds)
        self.worlds = [oracle.world]
        if "gpus" in axes or by == "gpus":
            most = max(oracle.world.processes, 8 * oracle.world.per_node)
            self.worlds = [_world(count, oracle.world) for count in sizes(oracle.world.per_node, most)]

    def seek(self) -> dict[str, Any]:
        """All of it as plain data. The plan's own maths come first, then the fewest ranks, then other maths."""
        own, *others = space.maths(self.oracle.plan, self.axes, installed())
        began = time.monotonic()
        groups = [self._group(own)]
        least = {
            name: self._least(own, hosted) for name, hosted in (("without_offload", False), ("with_offload", True))
        }
        groups += [self._group(one) for one in others]
        return {
            "format": FORMAT,
            "by": self.by,
            "axes": list(self.axes),
            "world": {"processes": self.oracle.world.processes, "processes_per_node": self.oracle.world.per_node},
            "hardware": self.oracle.plan.root.hardware.title or self.oracle.plan.root.hardware.kind,
            "capacity_bytes": round(self.oracle.plan.root.hardware.memory_gib * 2**30),
            "groups": groups,
            "fewest": {name: self._told(one) for name, one in least.items()},
            "notes": list(self.oracle.shaped.notes),
            "searching_seconds": round(time.monotonic() - began, 1),
        }

    def _group(self, maths: Mapping[str, Any]) -> dict[str, Any]:
        plan = space.changed(self.oracle.plan, maths, self.oracle.world.processes)
        candidates = [one for world in self.worlds for one in space.candidates(plan, world, self.axes, maths)]
        found = self.search.run(candidates) if candidates else Found((), (), {}, 0, 0, 0, 0, 0, 0.0)
        return {
            "maths": dict(maths),
            "ranked": [self._row(one) for one in found.ranked[:SHOWN]],
            "fitting": [self._row(one) for one in found.ranked[SHOWN:]],
            "unfit": [self._row(one) for one in found.unfit],
            "refused": dict(found.refused),
            **{name: getattr(found, name) for name in COUNTS},
        }

    def _row(self, one: Tried) -> dict[str, Any]:
        made = one.outcome
        return {
            "set": list(space.typed(self.oracle.typed, one.candidate)),
            "sharding": one.candidate.family,
            "processes": one.candidate.processes,
            "peak_bytes": made.bytes,
            "host_bytes_per_node": made.host_bytes,
            "fits": made.fits,
            "step_seconds": span(made.seconds),
            "tokens_per_second": span(made.tokens_per_second),
            "usd_per_step": span(made.usd),
        }

    def _least(self, maths: Mapping[str, Any], hosted: bool) -> Least | None:
        """The smallest world in which something fits; within its time the best there is in it."""
        plan = space.changed(self.oracle.plan, maths, self.oracle.world.processes)
        axes = [axis for axis in self.axes if axis != "gpus"]
        if hosted and "offload" not in axes:
            return None

        def lean(processes: int) -> list[Candidate]:
            return space.lean(space.candidates(plan, _world(processes, self.oracle.world), axes, maths), hosted)

        floor = 0 if hosted else self._floor()
        worlds = [count for count in sizes(self.oracle.world.per_node) if count >= floor]
        found = fewest(worlds, lean, self._fits)
        if found is None:
            return None
        return self._verified(found[1])

    def _fits(self, candidate: Candidate) -> bool:
        """By what is known of thriftier kin that does not fit; else by a rehearsal, however late: few are needed."""
        for other, made in self.search.known.items():
            thriftier = all(b >= a for a, b in zip(candidate.thrift, other.thrift, strict=True))
            if other.family == candidate.family and thriftier and not made.reason and not made.fits_device:
                return False
        return self.search.ask(candidate).fits

    def _floor(self) -> int:
        """Ranks below which not even what a checkpoint keeps, the weights and the optimizer's state, has room."""
        seen = [one.detail for one in self.search.known.values() if one.detail is not None]
        if not seen:
            return 1
        saved: Forecast = seen[0]
        kept, capacity = saved.kept.checkpoint, saved.room.capacity or 1
        return -(-(kept.model + kept.optimizer) // capacity)

    def _verified(self, candidate: Candidate) -> Least:
        """Rehearsed once more, with every check."""
        plan = self.evaluator.plan(candidate)
        seen = self.oracle.foresee(plan=plan)
        return Least(Tried(candidate, outcome(seen.forecast, seen.plan)), arithmetic(seen))

    def _told(self, least: Least | None) -> dict[str, Any] | None:
        return None if least is None else {**self._row(least.tried), "arithmetic": list(least.arithmetic)}


def _world(processes: int, like: World) -> World:
    return World(processes, min(processes, like.per_node))
