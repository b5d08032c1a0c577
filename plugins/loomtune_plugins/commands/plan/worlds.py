"""On how many processes, and nodes, a run is planned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loomtune.catalogue import Catalogue
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune.plan import Plan

MOST = 1024
"""Processes beyond which nobody asks how many are needed at least."""

SHARED = ("memory_gib", "memory_gb_per_second", "watts", "price")
"""Figures of a CPU that its processes divide among them, `tflops` besides."""


@dataclass(frozen=True, slots=True)
class World:
    """processes: in all. per_node: on a node that is full."""

    processes: int
    per_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.processes / self.per_node)


def world(plan: Plan, catalogue: Catalogue, asked: int | None) -> World:
    """asked: what was typed as `--world`. Raises UserError where a node cannot hold its processes, or none is known.

    Where `launcher.procs=auto`, a node has a process for each accelerator that it is planned with: what is in this
    machine says nothing about it.
    """
    hardware, launcher = plan.root.hardware, plan.chosen("launcher")
    many = any(Trait.MANY_PROCESSES in entry.offer.provides for entry in plan.entries(catalogue))
    procs, nodes = launcher.get("procs", "auto"), int(str(launcher.get("nodes", 1)).rpartition(":")[2] or 1)
    of_node = hardware.per_node if hardware.known else 0
    per_node = procs if isinstance(procs, int) else of_node or max(1, plan.processes // nodes)
    if asked is not None:
        processes = asked
    elif procs == "auto" and of_node:
        processes = nodes * of_node if many else 1
    else:
        processes = plan.processes
    if processes < 1:
        raise UserError.of("on how many processes this will run is not known", "add --world N, or set launcher.procs")
    if hardware.known and hardware.kind != "cpu" and per_node > of_node:
        what = f"launcher.procs={per_node} on nodes of {of_node} accelerators"
        raise UserError.of(what, f"set launcher.procs to at most {of_node}, or hardware.per_node")
    return World(processes, min(per_node, processes))


def placed(plan: Plan, world: World) -> Plan:
    """The plan in that world, with as many ranks on a node as it has.

    Accelerators are a process each; processes of a CPU share it, so that more of them than there are have less each.
    """
    hardware = {**plan.settings["hardware"], "per_node": world.per_node}
    crowd = world.per_node / plan.root.hardware.per_node
    if plan.root.hardware.kind == "cpu" and crowd > 1:
        hardware |= {name: hardware[name] / crowd for name in SHARED}
        hardware["tflops"] = {name: peak / crowd for name, peak in hardware["tflops"].items()}
    return replace(plan, settings={**plan.settings, "hardware": hardware}, processes=world.processes)


def sizes(per_node: int, most: int = MOST) -> Iterator[int]:
    """Worlds that are rented: parts of a node that divide it, then whole nodes."""
    yield from (count for count in range(1, per_node) if per_node % count == 0)
    yield from range(per_node, most + 1, per_node)
