"""What is foreseen as plain data: the form of `loomtune plan --json` and of RUN/plan.json.

Every number has its unit in its name, a range is [low, high], null is what is not known. `docs/planning.md` has it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loomtune import __version__
from loomtune.offers import AXES
from loomtune.plan import Finding
from loomtune_plugins.commands.plan.foreseen import Foreseen
from loomtune_plugins.planner.forecast import Forecast
from loomtune_plugins.planner.trace import Peak

FORMAT = 1

LASTING = ("parameters", "gradients", "optimizer", "roles")
"""Causes that grow with parameters, not with tokens."""


def described(seen: Foreseen) -> dict[str, Any]:
    """All of it."""
    made = seen.forecast
    return {
        "format": FORMAT,
        "loomtune": __version__,
        "fits": made.room.fits,
        **_planned(seen),
        "memory": _memory(seen),
        "communication": _communication(seen),
        "compute": _compute(made),
        "time": _time(made),
        "cost": _cost(made),
        "checkpoint": _checkpoint(made),
        "arithmetic": arithmetic(seen),
        "unknown": list(made.unknown),
        "notes": list(dict.fromkeys(seen.notes)),
        "findings": [finding(one) for one in seen.findings],
        "planning_seconds": round(seen.seconds, 2),
    }


def finding(one: Finding) -> dict[str, Any]:
    return {"what": one.what, "cure": one.cure, "fatal": one.fatal}


def _planned(seen: Foreseen) -> dict[str, Any]:
    """What all of it is said of."""
    trace, speed = seen.trace, seen.forecast.speed
    return {
        "world": {
            "processes": seen.world.processes,
            "nodes": seen.world.nodes,
            "processes_per_node": seen.world.per_node,
            "rank": trace.rank,
        },
        "settings": _settings(seen),
        "overrides": list(seen.typed.overrides),
        "hardware": _hardware(seen),
        "model": {
            "shape": seen.shape or None,
            **dict(zip(("parameters", "trained_parameters", "active_parameters"), trace.parameters, strict=True)),
        },
        "step": {
            "tokens": speed.tokens,
            "targets": speed.targets,
            "longest_tokens_per_rank": trace.tokens,
            "micro_batches": trace.micro,
            "batch_micro": seen.plan.root.batch.micro,
        },
    }


def _settings(seen: Foreseen) -> dict[str, Any]:
    """What was chosen of each axis, and the root's settings that memory and time hang on."""
    chosen = {axis.name: list(names) for axis in AXES if (names := seen.typed.choices(axis.name))}
    root = seen.typed.root
    more = {"precision": root.precision, "max_length": root.max_length, "packing": root.packing}
    return {**chosen, **more, "batch_size": root.batch.size, "batch_micro": root.batch.micro}


def _hardware(seen: Foreseen) -> dict[str, Any] | None:
    hardware = seen.typed.root.hardware
    if not hardware.known:
        return None
    return {
        "kind": hardware.kind,
        "title": hardware.title,
        "memory_bytes": seen.forecast.room.capacity,
        "devices_per_node": seen.world.per_node,
        "tflops": dict(hardware.tflops),
    }


def _peak(peak: Peak) -> dict[str, Any]:
    return {"bytes": peak.bytes, "causes_bytes": dict(peak.causes)}


def _memory(seen: Foreseen) -> dict[str, Any]:
    trace, room = seen.trace, seen.forecast.room
    return {
        "peak_bytes": room.peak,
        "peak_moment": max(trace.moments, key=lambda name: trace.moments[name].bytes),
        "capacity_bytes": room.capacity,
        "free_bytes": None if room.capacity is None else room.capacity - room.peak,
        "causes_bytes": dict(trace.peak.causes),
        "kept_bytes": dict(trace.kept),
        "moments": {name: _peak(peak) for name, peak in trace.moments.items()},
        "host_bytes_per_rank": dict(trace.host),
        "host_bytes_per_node": room.host,
        "host_capacity_bytes_per_node": room.host_capacity,
    }


def _communication(seen: Foreseen) -> dict[str, Any]:
    """Of the rehearsed rank: what it sends."""
    sent = seen.traffic
    by = [
        {
            "operation": operation,
            "phase": phase,
            "collectives_per_step": share.count,
            "sent_bytes_inside_node": share.flow.inside,
            "sent_bytes_between_nodes": share.flow.between,
        }
        for (operation, phase), share in sent.by.items()
    ]
    return {
        "collectives_per_step": sent.collectives,
        "messages_per_step": sent.messages,
        "sent_bytes_inside_node_per_step": sent.rank.inside,
        "sent_bytes_between_nodes_per_step": sent.rank.between,
        "by": by,
    }


def _compute(made: Forecast) -> dict[str, Any]:
    """Operations of the rehearsed rank by convention, and what share of its peak they are."""
    flops = {f"{name}_flops_per_step": value for name, value in made.speed.flops.items()}
    return {**flops, **{name: span(made.speed.used.get(name)) for name in made.speed.flops}}


def _time(made: Forecast) -> dict[str, Any] | None:
    speed = made.speed
    if speed.times is None or speed.seconds is None:
        return None
    return {
        "step_seconds": span(speed.seconds),
        "phases_seconds": {name: [part.low, part.high] for name, part in speed.times.by_phase().items()},
        "causes_seconds": {name: [part.low, part.high] for name, part in speed.times.by_cause().items()},
        "tokens_per_second": span(speed.rate),
        "targets_per_second": span(speed.target_rate),
        "steps": made.whole.steps,
        "total_seconds": span(made.whole.seconds),
        "assumptions": list(made.assumptions),
    }


def _cost(made: Forecast) -> dict[str, Any] | None:
    whole = made.whole
    if whole.device_hours is None:
        return None
    return {
        "device_hours": span(whole.device_hours),
        "usd": span(whole.usd),
        "energy_kwh": span(whole.kilowatt_hours),
    }


def _checkpoint(made: Forecast) -> dict[str, Any]:
    saved = made.kept.checkpoint
    return {
        "bytes": saved.bytes,
        "model_bytes": saved.model,
        "optimizer_bytes": saved.optimizer,
        "bytes_per_rank": saved.files,
        "exported_bytes": saved.exported,
        "save_seconds": span(made.kept.save),
        "waits_seconds": span(made.kept.waits),
        "disk_bytes": made.kept.disk,
    }


def arithmetic(seen: Foreseen) -> list[dict[str, Any]]:
    """How the peak comes about: what is kept, in bytes a parameter; what the moment adds; what is left."""
    trace, room, every = seen.trace, seen.forecast.room, seen.trace.parameters[0]
    rows: list[dict[str, Any]] = []
    for cause, count in sorted(trace.peak.causes.items(), key=lambda one: -one[1]):
        rows.append({"what": cause, "bytes": count, "reasoning": _reasoned(cause, count, seen)})
    rows.append({"what": "peak", "bytes": room.peak, "reasoning": "of a rank, all of these"})
    for cause, count in sorted(trace.host.items(), key=lambda one: -one[1]):
        said = f"in host memory: {count * trace.processes / max(1, every):.2f} bytes for each of {every:,} parameters"
        rows.append({"what": f"host: {cause}", "bytes": count, "reasoning": said})
    if room.capacity is not None:
        left = room.capacity - room.peak
        rows.append({"what": "left" if left >= 0 else "lacking", "bytes": left, "reasoning": f"of {room.capacity:,}"})
    return rows


def _reasoned(cause: str, count: int, seen: Foreseen) -> str:
    """To what the bytes of a cause stand in a proportion that one can check by hand."""
    trace, precision = seen.trace, seen.plan.root.precision
    every, trained, _ = trace.parameters
    if cause in LASTING:
        of = trained if cause in ("gradients", "optimizer") else every
        ranks = "a rank alone" if trace.processes == 1 else f"over {trace.processes} ranks"
        return f"{count * trace.processes / max(1, of):.2f} bytes for each of {of:,} parameters, {ranks}"
    if cause == "gathered":
        share = count / (2 if precision == "bf16" else 4) / max(1, every)
        return f"room for {share:.1%} of {every:,} parameters in {precision}, and for their gradients on their way"
    if cause == "overhead":
        return "workspaces of libraries"
    return f"{count / max(1, trace.tokens // max(1, trace.micro)):,.0f} bytes for each token of a micro-batch"


def span(low_high: Sequence[float] | None) -> list[float] | None:
    """As JSON holds a range; null where it is not known."""
    return None if low_high is None else list(low_high)


def refusal(seen: Foreseen, remedies: Sequence[str] = ()) -> Finding | None:
    """What is said of a run that will not fit; None where it does, or nobody knows."""
    room = seen.forecast.room
    if room.fits is not False:
        return None
    what = _lacks(seen.trace.peak.causes, room.peak, room.capacity or 0)
    if room.host_capacity is not None and room.host > room.host_capacity:
        lacks = f"a node needs {_gib(room.host)} GiB of host memory and has {_gib(room.host_capacity)}"
        what = lacks if room.peak <= (room.capacity or 0) else f"{what}; {lacks}"
    cure = "; or ".join(remedies) or "use more ranks, or devices with more memory"
    return Finding(f"this run will not fit: {what}", cure)


def _lacks(causes: Mapping[str, int], peak: int, capacity: int) -> str:
    largest = sorted(causes.items(), key=lambda one: -one[1])[:3]
    of = ", ".join(f"{cause} {_gib(count)}" for cause, count in largest)
    return f"a rank needs {_gib(peak)} GiB and has {_gib(capacity)}, {_gib(peak - capacity)} too few; most are {of}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"
