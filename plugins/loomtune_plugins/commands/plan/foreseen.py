"""A plan, foretold: rehearsed, forecast, and laid beside the device that it is for. Imports torch when it is asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Finding, Plan
from loomtune_plugins.commands.plan.shapes import Shaped, shaped
from loomtune_plugins.commands.plan.worlds import World, placed
from loomtune_plugins.planner.depth import continued, depths
from loomtune_plugins.planner.flops import mean_length
from loomtune_plugins.planner.forecast import Forecast, Rows, forecast, shared_by
from loomtune_plugins.planner.rehearse import rehearse, traced
from loomtune_plugins.planner.trace import Trace
from loomtune_plugins.planner.wire import Traffic, backend_of, traffic

MARGIN = 0.85
"""Share of a device's memory that `batch.micro=auto` plans with, as the run itself does."""

PEAKS = ("bf16", "fp32", "tf32", "fp16", "fp8", "fp64")
"""Types whose peaks makers print; loomtune computes in the first two."""

Words = Sequence[int]
"""Words of a row's prompt, and of its answers."""


@dataclass(frozen=True)
class Foreseen:
    """Everything that is known of a run that was not started.

    plan: that was rehearsed, with shapes in place of models that are not at hand. typed: as it was asked for.
    """

    typed: Plan
    plan: Plan
    world: World
    trace: Trace
    forecast: Forecast
    shape: str = ""
    notes: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    seconds: float = 0.0

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes on the wire of a step."""
        return traffic(self.trace, self.world.per_node, backend_of(self.plan.root.hardware))


class Oracle:
    """Foretells a plan and its variants; what was rehearsed once is not rehearsed again.

    plan: as it was typed, in its world. rank: that is rehearsed.
    """

    def __init__(self, plan: Plan, world: World, rank: int = 0) -> None:
        if not 0 <= rank < world.processes:
            raise UserError.of(f"--rank {rank} is none of {world.processes}", f"name 0 to {world.processes - 1}")
        if strange := sorted(plan.root.hardware.tflops.keys() - PEAKS):
            raise UserError.of(f"hardware.tflops.{strange[0]} is a type of nothing", f"name some of {', '.join(PEAKS)}")
        self.typed, self.world, self.rank = placed(plan, world), world, rank
        self.shaped: Shaped = shaped(self.typed, installed())
        self.rows, self.longest, self.lacks = (Rows(), (), ()) if self.shaped.notes else _rows(self.plan)
        self.known: dict[str, Trace] = {}

    @property
    def plan(self) -> Plan:
        """That can be rehearsed."""
        return self.shaped.plan

    def foresee(self, findings: Sequence[Finding] = (), plan: Plan | None = None) -> Foreseen:
        """The plan itself, or a variant in another world, with every check of the rehearsal."""
        began, world = time.monotonic(), self.world
        if plan is not None and plan.processes != world.processes:
            world = World(plan.processes, min(world.per_node, plan.processes))
        plan, said = self.sized(plan or self.plan, world)
        trace = rehearse(plan, world.processes, min(self.rank, world.processes - 1), rows=self.longest)
        made = forecast(trace, plan, installed(), rows=self.rows)
        notes = (*self.shaped.notes, *self.lacks, *said, *trace.notes)
        took = time.monotonic() - began
        return Foreseen(self.typed, plan, world, trace, made, self.shaped.shape, notes, findings, seconds=took)

    def shallow(self, plan: Plan, processes: int) -> Trace:
        """The trace of a variant, continued from two depths, without looking at a third."""
        rank = min(self.rank, processes - 1)
        key = plan.hash + repr(plan.settings) + str(processes)
        if key not in self.known:
            model = plan.build(installed(), "model")
            chosen = depths(*model.depth())
            if chosen:
                one, other = (traced(plan, processes, rank, rows=self.longest, blocks=blocks) for blocks in chosen[:2])
                self.known[key] = continued(one, other, model.depth()[0])
            else:
                self.known[key] = traced(plan, processes, rank, rows=self.longest)
        return self.known[key]

    def sized(self, plan: Plan, world: World) -> tuple[Plan, Sequence[str]]:
        """The plan with a number in place of `batch.micro=auto`, found as a run on an accelerator finds it."""
        hardware = plan.root.hardware
        if not isinstance(plan.root.batch.micro, str) or hardware.kind in ("", "cpu"):
            return plan, ()
        rows = rows_of_a_rank(plan, world.processes)
        capacity = int(hardware.memory_gib * 2**30 * MARGIN)
        micro = affordable(lambda count: self._alone(plan, world, count), rows, capacity)
        return _micro(plan, micro), (
            f"batch.micro=auto: {micro} of a rank's {rows} rows at once, by {MARGIN:.0%} of its memory",
        )

    def _alone(self, plan: Plan, world: World, rows: int) -> int:
        """Peak of a step whose one micro-batch has so many rows: what a run measures before its first."""
        size = rows * max(1, plan.training(world.processes) // shared_by(plan))
        batch = {**plan.settings["batch"], "micro": rows, "size": size}
        return self.shallow(replace(plan, settings={**plan.settings, "batch": batch}), world.processes).peak.bytes


def affordable(peak: Callable[[int], int], rows: int, capacity: int) -> int:
    """Rows that fit into `capacity` bytes, where one and two peak as said: memory grows evenly with rows."""
    if rows == 1:
        return 1
    one, two = peak(1), peak(2)
    return min(rows, max(1, 1 + (capacity - one) // max(1, two - one)))


def rows_of_a_rank(plan: Plan, processes: int) -> int:
    """Of one step; the most that any has."""
    return math.ceil(plan.root.batch.size / max(1, plan.training(processes) // shared_by(plan)))


def _micro(plan: Plan, count: int) -> Plan:
    return replace(plan, settings={**plan.settings, "batch": {**plan.settings["batch"], "micro": count}})


def _rows(plan: Plan) -> tuple[Rows, Sequence[Words], Sequence[str]]:
    """What is known of the training rows, the longest as words, and why nothing is where they are not at hand."""
    try:
        data = plan.build(installed(), "data")
        if data.window:
            return Rows(), (), ()
        data.check()
        from loomtune.session import looked_at

        samples = looked_at(replace(plan, processes=1)).splits["train"]
    except (UserError, OSError, ValueError) as error:  # no rows, or no tokenizer: what is full is planned for
        why = error.faults[0].what if isinstance(error, UserError) else str(error)
        return Rows(), (), (f"rows were not read: {why}",)
    lengths = [int(one) for one in samples.lengths]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    known = Rows(len(lengths), sum(lengths) / len(lengths), float(lengths[longest]), mean_length(lengths))
    return known, () if plan.root.packing else [words(samples[longest])], ()


def words(sample: Any) -> Words:
    """How many words of a prompt, and of one or two answers, make a sample as long as this."""
    parents = [segment.parent for segment in sample.segments]
    if len(parents) == 3 and parents[1] == parents[2]:
        return [len(segment.tokens) for segment in sample.segments]
    targets = sum(int(segment.is_target.sum()) for segment in sample.segments)
    return [max(1, sum(len(segment.tokens) for segment in sample.segments) - targets), max(1, targets)]
