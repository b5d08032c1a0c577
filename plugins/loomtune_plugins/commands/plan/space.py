"""What `--search` tries: every configuration that differs from the plan along the axes that are searched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from loomtune.catalogue import Catalogue, installed
from loomtune.contracts import Model
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune.plan import Plan
from loomtune_plugins.commands.plan.worlds import World
from loomtune_plugins.planner.search import Candidate

LAYOUT = ("sharding", "replicate", "tensor", "sequence", "checkpointing", "accumulation", "offload", "micro")
"""Axes that decide how a step is computed, never what."""
MATHS = ("precision", "adapter")
"""Axes of another run: its losses are others."""
AXES = (*LAYOUT, "gpus", *MATHS)


def slower(plan: Plan) -> tuple[bool, ...]:
    """Of each of `Candidate.thrift` (ranks, stage, copies, tensor, sequence, checkpointing, accumulation, offload,
    micro-batch) whether more of it never makes a step faster.

    Layers and rows are cut for want of memory alone, unless a step has fewer rows than ranks: then cuts give work.
    """
    idle = plan.root.batch.size < plan.processes
    return (False, False, False, not idle, not idle, True, True, True, True)


Values = Callable[[World, Any], Sequence[Any]]
"""World and the default to the values of a setting, the thriftiest last."""


@dataclass(frozen=True, slots=True)
class Lever:
    """A setting of a sharding that saves memory. axis: of the search, by which it is asked for."""

    axis: str
    setting: str
    values: Values


FREE = ("activation_checkpointing", "accumulate_sharded")
"""Settings of a sharding on which nothing hangs but memory and time."""


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


LEVERS = (
    Lever("sharding", "stage", lambda world, default: (1, 2, 3)),
    Lever("replicate", "replicate", lambda world, default: _divisors(world.processes)[::-1][1:] or [1]),
    Lever("tensor", "tensor", lambda world, default: _divisors(world.per_node)),
    Lever("sequence", "sequence", lambda world, default: _divisors(world.per_node)),
    Lever("checkpointing", "activation_checkpointing", lambda world, default: (False, True)),
    Lever("accumulation", "accumulate_sharded", lambda world, default: (False, True)),
    Lever(
        "offload",
        "offload",
        lambda world, default: (False, True) if isinstance(default, bool) else ("none", "optimizer", "all"),
    ),
)


def asked(text: str) -> tuple[str, ...]:
    """The axes that `--search=...` names. Raises UserError where one is unknown."""
    if text in ("", "all"):
        return (*LAYOUT, *MATHS)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in AXES]:
        raise UserError.of(f"--search: no axis is called {unknown[0]}", f"name some of {', '.join(AXES)}")
    return names


def maths(plan: Plan, axes: Sequence[str], catalogue: Catalogue) -> Iterator[Mapping[str, Any]]:
    """What is changed of the maths, the plan's own first; adapters are those that others are named after."""
    adapters: list[str] = [plan.chosen("adapter")["name"]]
    precisions = [plan.root.precision]
    if "adapter" in axes:
        adapters += [name for name in ("full", "lora", "qlora") if name in catalogue.names("adapter")]
    if "precision" in axes:
        precisions += ["bf16"]
    for adapter, precision in itertools.product(dict.fromkeys(adapters), dict.fromkeys(precisions)):
        yield {"adapter": adapter, "precision": precision}


def candidates(plan: Plan, world: World, axes: Sequence[str], more: Mapping[str, Any]) -> list[Candidate]:
    """Every configuration in a world along the axes; what a sharding itself refuses is left out.

    more: settings that all of them have besides.
    """
    catalogue = installed()
    own = plan.chosen("sharding")["name"]
    names = catalogue.names("sharding") if "sharding" in axes else [own]
    model: Model = plan.build(catalogue, "model")
    found: dict[tuple[Any, ...], Candidate] = {}
    for name in sorted(names, key=lambda name: name != own):
        possible = cache(lambda layout, name=name: _possible(model, world, name, dict(layout), catalogue))
        for chosen in _layouts(plan, world, name, axes):
            if possible(tuple((key, value) for key, value in chosen.items() if key not in FREE)):
                for candidate in _sized(plan, world, name, chosen, axes, more):
                    found.setdefault((candidate.family, candidate.thrift), candidate)
    return list(found.values())


def _layouts(plan: Plan, world: World, name: str, axes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Settings of a sharding along the axes, the plan's own where an axis is not searched."""
    default, own = _defaults(name), plan.chosen("sharding")
    carried = {key: value for key, value in own.items() if key in default and (own["name"] == name or _lever(key))}
    base = {**default, **{key: value for key, value in carried.items() if type(value) is type(default[key])}}
    levers = [lever for lever in LEVERS if lever.setting in base]
    values = [
        lever.values(world, default[lever.setting]) if lever.axis in axes else [base[lever.setting]] for lever in levers
    ]
    for chosen in itertools.product(*values):
        layout = {**base, **dict(zip((lever.setting for lever in levers), chosen, strict=True))}
        tensor, sequence = layout.get("tensor", 1), layout.get("sequence", 1)
        both = tensor > 1 < sequence and {"tensor", "sequence"} <= {*axes}  # either saves what the other does
        if (
            not both
            and (cuts := tensor * sequence) <= world.per_node
            and world.processes % (layout.get("replicate", 1) * cuts) == 0
        ):
            yield layout


def _lever(key: str) -> bool:
    return any(lever.setting == key for lever in LEVERS)


@cache
def _defaults(name: str) -> dict[str, Any]:
    return asdict(installed().find("sharding", name).offer.schema())


def _possible(model: Model, world: World, name: str, layout: Mapping[str, Any], catalogue: Catalogue) -> bool:
    many = Trait.MANY_PROCESSES in catalogue.find("sharding", name).offer.provides
    if world.processes > 1 and not many:
        return False
    try:
        sharding = catalogue.build("sharding", name, {**layout, "name": name})
        sharding.check(world.processes)
        sharding.suits(model)
    except UserError:
        return False
    return True


def _sized(
    plan: Plan, world: World, name: str, layout: Mapping[str, Any], axes: Sequence[str], more: Mapping[str, Any]
) -> Iterator[Candidate]:
    """A layout with every micro-batch. Of a single one the gradients are reduced at once, however several's are."""
    replicas = max(1, world.processes // (layout.get("tensor", 1) * layout.get("sequence", 1)))
    rows = math.ceil(plan.root.batch.size / replicas)
    fixed = plan.root.batch.micro
    for micro in _micros(rows) if "micro" in axes or isinstance(fixed, str) else [min(int(fixed), rows)]:
        sharded = micro == rows or layout.get("accumulate_sharded", True)
        settings = {**more, "sharding": name, **{f"sharding.{key}": value for key, value in layout.items()}}
        settings["batch.micro"] = micro
        if micro == rows and "accumulate_sharded" in layout:
            settings["sharding.accumulate_sharded"] = _defaults(name)["accumulate_sharded"]
        hosted = _index(layout.get("offload", False), (False, "none", "optimizer", True, "all"))
        thrift = (
            world.processes,
            layout.get("stage", 0),
            -layout.get("replicate", 1),
            layout.get("tensor", 1),
            layout.get("sequence", 1),
            layout.get("activation_checkpointing", False),
            sharded,
            hosted,
            -micro,
        )
        yield Candidate(name, tuple(map(float, thrift)), tuple(settings.items()), world.processes, max(0, hosted - 1))


def _micros(rows: int) -> list[int]:
    """One row, two, four, ..., and all that a rank has of a step."""
    return sorted({*itertools.takewhile(lambda one: one < rows, (2**power for power in range(20))), rows})


def _index(value: Any, among: Iterable[Any]) -> int:
    return next((place for place, one in enumerate(among) if one is value or one == value), 0)


def lean(found: Sequence[Candidate], hosted: bool) -> list[Candidate]:
    """Of these candidates the thriftiest, with or without what lies in host memory: none is thriftier in every way."""
    among = [one for one in found if bool(one.hosted) == hosted]

    def better(one: Candidate, other: Candidate) -> bool:
        steps = zip(one.thrift, other.thrift, strict=True)
        return (other.family, other.thrift) != (one.family, one.thrift) and all(b >= a for a, b in steps)

    return [one for one in among if not any(better(one, other) for other in among if other.family == one.family)]


def changed(plan: Plan, settings: Mapping[str, Any], processes: int) -> Plan:
    """The plan with other choices and settings. settings: as typed; a choice begins from its own defaults."""
    tree: dict[str, Any] = {**plan.settings}
    catalogue = installed()
    for key, value in settings.items():
        axis, _, rest = key.partition(".")
        if not rest and axis in ("sharding", "adapter"):
            if tree[axis]["name"] != value:
                tree[axis] = {**asdict(catalogue.find(axis, value).offer.schema()), "name": value}
        elif not rest:
            tree[axis] = value
        else:
            tree[axis] = {**tree[axis], rest: value}
    return replace(plan, settings=tree, processes=processes)


def typed(plan: Plan, candidate: Candidate) -> tuple[str, ...]:
    """What to type, over the plan, for a candidate: what differs from it, or from the defaults of another choice."""
    words: list[str] = []
    base = plan.settings
    for key, value in candidate.settings:
        axis, _, rest = key.partition(".")
        if not rest:
            differs = (base[axis]["name"] if axis in ("sharding", "adapter") else base[axis]) != value
        elif axis == "sharding" and dict(candidate.settings)["sharding"] != base["sharding"]["name"]:
            differs = _defaults(dict(candidate.settings)["sharding"])[rest] != value
        else:
            differs = base[axis].get(rest) != value
        if differs:
            words.append(f"{key}={_said(value)}")
    return tuple(words)


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
