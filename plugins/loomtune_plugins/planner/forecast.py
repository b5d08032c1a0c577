"""From a rehearsed step to what a run comes to: room, time, money, energy, checkpoints. Arithmetic on plain data.

None is what cannot be known; `Forecast.unknown` names the settings that lack. Ranges are (low, high).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loomtune.catalogue import Catalogue
from loomtune.offers import Trait
from loomtune.plan import Plan
from loomtune.settings import Hardware, Settings
from loomtune_plugins.planner import kernels, roofline
from loomtune_plugins.planner.flops import step_flops
from loomtune_plugins.planner.roofline import Times
from loomtune_plugins.planner.saving import Saving, saving, seconds_to_write
from loomtune_plugins.planner.trace import Trace

Range = tuple[float, float]

PROCESS = 1.5 * 2**30
"""Bytes of host memory of a process that holds torch and talks to an accelerator, before anything else."""

TOKEN_BYTES = 5
"""Of a token of the made samples, which lie in a file: its id and whether it is a target. A node maps them once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the data. rows: of the training split, 0 where nobody counted them.

    mean: tokens of a row, and `longest` of the longest, which the trace is of; 0 where unknown. met: of the row that a
    token finds itself in on average (`flops.mean_length`).
    """

    rows: int = 0
    mean: float = 0.0
    longest: float = 0.0
    met: float = 0.0

    @property
    def tokens(self) -> float:
        """Of all rows, as far as anybody knows."""
        return self.rows * (self.mean or self.longest)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory in bytes: of a rank, and of its device; of a node's host. fits: True where both have room."""

    peak: int
    capacity: int | None
    host: int
    host_capacity: int | None
    fits: bool | None


@dataclass(frozen=True, slots=True)
class Speed:
    """A step. tokens, targets: over all ranks; rate, target_rate: of them a second.

    flops: of this rank by convention; used: of its peak. times: where the seconds go, even where some are unknown.
    """

    tokens: float
    targets: float
    flops: Mapping[str, float]
    times: Times | None
    seconds: Range | None
    rate: Range | None
    target_rate: Range | None
    used: Mapping[str, Range]


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole run. seconds: of its steps and of the waits for checkpoints; reading and making samples left out."""

    steps: int | None
    seconds: Range | None = None
    device_hours: Range | None = None
    usd: Range | None = None
    kilowatt_hours: Range | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What is saved. save: seconds until a checkpoint is there; waits: until training goes on.

    disk: bytes of the run's folder at its fullest.
    """

    checkpoint: Saving
    save: Range | None
    waits: Range | None
    disk: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run comes to; `figures.lines` says how each figure comes about."""

    room: Room
    speed: Speed
    whole: Whole
    kept: Kept
    unknown: Sequence[str]
    assumptions: Sequence[str]


def forecast(
    trace: Trace, plan: Plan, catalogue: Catalogue, hardware: Hardware | None = None, rows: Rows | None = None
) -> Forecast:
    """What the run of a plan comes to. trace: of its step, deep. hardware: default, the plan's.

    rows: what is known of the data; without, every row is as long as the trace's, and only `steps` says how many.
    """
    root, hardware, rows = plan.root, hardware or plan.root.hardware, rows or Rows()
    speed = _speed(trace, root, hardware, rows, shared_by(plan))
    kept = _kept(trace, root, hardware, rows, saving(trace, plan, catalogue))
    whole = _whole(trace.processes, speed, kept, root, hardware, rows)
    assumptions = [*(speed.times.assumptions if speed.times else ()), *_assumptions(rows, root)]
    room = _room(trace, hardware, rows, kept.checkpoint)
    unknown = [*_unknown(hardware, speed.times, whole.steps), *_unseen(plan, catalogue)]
    return Forecast(room, speed, whole, kept, unknown, assumptions)


def shared_by(plan: Plan) -> int:
    """Ranks that compute on the same rows."""
    chosen = plan.chosen("sharding")
    return int(chosen.get("sequence") or 1) * int(chosen.get("tensor") or 1)


def _room(trace: Trace, hardware: Hardware, rows: Rows, saved: Saving) -> Room:
    """A node holds its processes, what they offload, a checkpoint's copies, and the mapped samples."""
    here = min(hardware.per_node, trace.processes) if hardware.known else trace.processes
    host = round(here * (PROCESS + sum(trace.host.values()) + saved.files) + rows.tokens * TOKEN_BYTES)
    capacity = round(hardware.memory_gib * 2**30) or None
    host_capacity = round(hardware.host_gib * 2**30) or None
    enough = trace.peak.bytes <= (capacity or 0) and (host_capacity is None or host <= host_capacity)
    return Room(trace.peak.bytes, capacity, host, host_capacity, enough if capacity else None)


def _speed(trace: Trace, root: Settings, hardware: Hardware, rows: Rows, shared: int) -> Speed:
    mean = trace
    if rows.mean and rows.longest:  # rows are shorter than the longest, and attention meets rows shorter still
        mean = roofline.scaled(trace, rows.mean / rows.longest, (rows.met or rows.mean) / rows.longest)
    tokens, targets = (number * _replicas(trace, root, shared) for number in (mean.tokens, mean.targets))
    flops = step_flops(mean, shared)
    times = roofline.times(mean, hardware) if hardware.known else None
    if times is None or times.unknown or not times.step.low:
        return Speed(tokens, targets, flops, times, None, None, None, {})
    took = times.step.low, times.step.high
    peak = kernels.peak_of(root.precision, hardware)
    used = {name: _per(number / peak, took) for name, number in flops.items()} if peak else {}
    return Speed(tokens, targets, flops, times, took, _per(tokens, took), _per(targets, took), used)


def _replicas(trace: Trace, root: Settings, shared: int) -> float:
    """By how much all ranks' rows exceed the first one's, which has the most where they cannot be dealt out evenly."""
    replicas = trace.processes // shared
    size = root.batch.size
    return replicas if root.packing else size / -(-size // replicas)


def _kept(trace: Trace, root: Settings, hardware: Hardware, rows: Rows, saved: Saving) -> Kept:
    """Beside the checkpoints that stay are the best one, and one that is being written."""
    save, waits = seconds_to_write(saved, trace, hardware) if hardware.known else (None, None)
    many = root.checkpoint.keep + 1 + bool(root.evaluate.best)
    return Kept(saved, save, waits, many * saved.bytes + saved.exported + round(rows.tokens * TOKEN_BYTES))


def _whole(processes: int, speed: Speed, kept: Kept, root: Settings, hardware: Hardware, rows: Rows) -> Whole:
    steps = _steps(root, rows)
    if steps is None or speed.seconds is None:
        return Whole(steps)
    saves = -(-steps // (root.checkpoint.every or steps))  # always at the end
    seconds = [steps * took + saves * wait for took, wait in zip(speed.seconds, kept.waits or (0.0, 0.0), strict=True)]
    total = seconds[0], seconds[1]
    hours = _by(total, processes / 3600)
    usd, energy = (_by(hours, each) if each else None for each in (hardware.price, hardware.watts / 1000))
    return Whole(steps, total, hours, usd, energy)


def _steps(root: Settings, rows: Rows) -> int | None:
    """Optimizer steps until the run ends, or is stopped; None where nobody knows how many rows there are."""
    if root.steps:
        steps = root.steps
    elif not rows.rows:
        return None
    elif root.batch.sampler == "packed" and root.max_length and rows.mean:
        steps = math.ceil(root.epochs * rows.tokens / (root.batch.size * root.max_length))
    else:
        steps = math.ceil(round(rows.rows * root.epochs) / root.batch.size)
    return min(steps, root.stop_after) if root.stop_after else steps


def _unknown(hardware: Hardware, times: Times | None, steps: int | None) -> list[str]:
    """Settings that lack, and what cannot be known without them."""
    if not hardware.known:
        return ["hardware: whether it fits, time and cost"]
    lacks = {
        "hardware.memory_gib: whether it fits": not hardware.memory_gib,
        **{f"{key}: time and cost": True for key in (times.unknown if times else ())},
        "steps, or rows to count: total time and cost": steps is None,
        "hardware.price: cost": not hardware.price,
        "hardware.watts: energy": not hardware.watts,
        "hardware.disk_gb_per_second: time to save": not hardware.disk_gb_per_second,
    }
    return [text for text, lack in lacks.items() if lack]


def _unseen(plan: Plan, catalogue: Catalogue) -> list[str]:
    """What a run does that no rehearsal sees."""
    named = plan.settings.get("objective", {}).get("name")
    if named and Trait.GENERATION in catalogue.find("objective", named).offer.needs:
        return ["generation, and scores of what is generated: their time is in no figure"]
    return []


def _assumptions(rows: Rows, root: Settings) -> list[str]:
    found = [] if rows.mean else ["every row is as long as the longest that may be: no rows were at hand"]
    if rows.mean and not root.packing:
        found.append("rows of a micro-batch are equally long, so that nothing is padded")
    if root.checkpoint.background:
        found.append("checkpoints are written beside training, which waits while they are copied")
    return found


def _per(number: float, seconds: Range) -> Range:
    return number / seconds[1], number / seconds[0]


def _by(span: Range, factor: float) -> Range:
    return span[0] * factor, span[1] * factor
