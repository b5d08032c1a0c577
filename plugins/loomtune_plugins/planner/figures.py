"""Each figure of a forecast in a line that says how it comes about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loomtune.plan import Plan
from loomtune.settings import Hardware
from loomtune_plugins.planner.forecast import Forecast, Range
from loomtune_plugins.planner.trace import Trace


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, or a range of them. unit: `bytes`, `seconds`, `tokens/s`, `USD`, `kWh`, `share`, `steps`."""

    subject: str
    low: float
    high: float
    unit: str
    reasoning: str


def lines(made: Forecast, trace: Trace, plan: Plan, hardware: Hardware | None = None) -> list[Figure]:
    """Whatever is known, in the order in which one asks for it."""
    hardware = hardware or plan.root.hardware
    return [*_memory(made, trace), *_time(made, trace), *_money(made, trace, hardware), *_saved(made, trace, plan)]


def _memory(made: Forecast, trace: Trace) -> Iterator[Figure]:
    moment = max(trace.moments, key=lambda name: trace.moments[name].bytes)
    causes = sorted(trace.peak.causes.items(), key=lambda one: -one[1])[:3]
    of = ", ".join(f"{cause} {bytes / 2**30:.1f}" for cause, bytes in causes)
    yield _one("peak memory of a rank", made.room.peak, "bytes", f"in {moment}; GiB of {of}")
    yield _one("host memory of a node", made.room.host, "bytes", "processes, what they offload, a checkpoint's copies")


def _time(made: Forecast, trace: Trace) -> Iterator[Figure]:
    speed = made.speed
    if speed.times is None or speed.seconds is None or speed.rate is None:
        return
    causes = sorted(speed.times.by_cause().items(), key=lambda one: -one[1].high)
    of = ", ".join(f"{cause} {part.low:.3g} to {part.high:.3g}" for cause, part in causes[:4])
    yield _range("time of a step", speed.seconds, "seconds", of)
    yield _range("speed", speed.rate, "tokens/s", f"{speed.tokens:.0f} tokens a step over {trace.processes} ranks")
    if speed.target_rate and speed.targets != speed.tokens:
        yield _range(
            "speed of targets", speed.target_rate, "tokens/s", f"{speed.targets:.0f} of a step's are predicted"
        )
    for name, used in speed.used.items():
        yield _range(name, used, "share", f"{speed.flops[name]:.4g} operations a step and rank, of the peak")


def _money(made: Forecast, trace: Trace, hardware: Hardware) -> Iterator[Figure]:
    whole = made.whole
    if whole.steps is not None:
        yield _one("steps", whole.steps, "steps", "of the optimizer, in the whole run")
    if whole.seconds:
        yield _range("total time", whole.seconds, "seconds", f"{whole.steps} steps, and the waits for checkpoints")
    if whole.usd:
        yield _range("cost", whole.usd, "USD", f"{trace.processes} accelerators at {hardware.price:g} USD an hour")
    if whole.kilowatt_hours:
        yield _range("energy", whole.kilowatt_hours, "kWh", f"{trace.processes} accelerators at {hardware.watts:g} W")


def _saved(made: Forecast, trace: Trace, plan: Plan) -> Iterator[Figure]:
    saved, keep = made.kept.checkpoint, plan.root.checkpoint.keep
    parts = f"weights {saved.model / 1e9:.3g}, optimizer {saved.optimizer / 1e9:.3g} GB, and {saved.words / 1e6:.2g} MB"
    yield _one("checkpoint", saved.bytes, "bytes", f"{parts} of words, in files of {trace.processes} ranks")
    if made.kept.save:
        yield _range("time to save", made.kept.save, "seconds", "copied to the hosts, hashed, written by all nodes")
    if saved.exported:
        yield _one("exported model", saved.exported, "bytes", "the trained weights in the exporters' type")
    yield _one("disk", made.kept.disk, "bytes", f"{keep} checkpoints, the best, one being written; what is exported")


def _one(subject: str, value: float, unit: str, reasoning: str) -> Figure:
    return Figure(subject, value, value, unit, reasoning)


def _range(subject: str, span: Range, unit: str, reasoning: str) -> Figure:
    return Figure(subject, *span, unit, reasoning)
