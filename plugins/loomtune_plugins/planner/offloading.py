"""What crosses the link to the host, and what its processors do, where a layout keeps things in host memory.

A rehearsal sees what lies there (`Trace.host`), not the copies, since its tensors have no device: they follow from its
messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loomtune_plugins.planner.trace import Trace, Work

HIDDEN = (1,)
"""Shape of a `copy` that computation may hide."""

REDUCTIONS = ("reduce_scatter", "all_reduce", "reduce")


def offloaded(trace: Trace) -> Sequence[Work]:
    """The step's work with these copies, and with the optimizer's as work of the host; as it is where nothing is there.

    Each gather begins with this rank's part on its way to the accelerator, each reduction ends with it on its way back.
    An optimizer on the host of parameters that stay on the accelerator sends these there, when it is done.
    """
    if not trace.host or any(one.kind in ("copy", "host") for one in trace.work):
        return trace.work
    there = {cause for cause, bytes in trace.host.items() if bytes}
    work = [
        replace(one, kind="host") if one.phase == "optimizer" and "optimizer" in there else one for one in trace.work
    ]
    return [*work, *_copies(trace, there)]


def _copies(trace: Trace, there: set[str]) -> Iterator[Work]:
    passes = [one for one in trace.collectives if one.phase in ("forward", "backward")]
    gathers = [one for one in passes if one.operation == "all_gather"]
    once = sum(one.bytes * one.count / len(one.ranks) for one in gathers if one.phase == "forward") / trace.micro
    if "parameters" in there and once:
        wider = trace.host["parameters"] / once  # of another type where they lie than where they are used
        for one in gathers:
            yield _copy(one.phase, wider * one.bytes / len(one.ranks), one.count)
    if there & {"gradients", "optimizer"}:
        for one in passes:
            if one.operation in REDUCTIONS and one.phase == "backward":
                yield _copy(one.phase, one.bytes / len(one.ranks), one.count)
    if "optimizer" in there and "parameters" not in there:
        yield replace(_copy("optimizer", trace.kept.get("parameters", 0), 1), shape=())


def _copy(phase: str, bytes: float, count: float) -> Work:
    return Work("copy", "", phase, HIDDEN, 0.0, bytes, count=count)
