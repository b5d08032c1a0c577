"""From what a step does to how long it takes: a range, not a number.

Kernels of a phase follow one another (`kernels`); messages and copies that may be hidden run beside them. The low end
takes the best published shares and hides whatever may be hidden. The high end takes the ordinary ones; it leaves the
longest message of each kind uncovered in every micro-batch, as the first gather and the last reduction are with
nothing to compute beside them; kernels beside messages are slower, and all ranks wait for the slowest. On CPUs it
hides nothing: there the same cores move the messages.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loomtune.settings import Hardware
from loomtune_plugins.planner import kernels, wire
from loomtune_plugins.planner.efficiency import BESIDE, HOST_BANDWIDTH, UNEVEN, Efficiency, efficiency_of
from loomtune_plugins.planner.kernels import Span
from loomtune_plugins.planner.offloading import HIDDEN, offloaded
from loomtune_plugins.planner.trace import Collective, Trace, Work

CAUSES = ("matmul", "attention", "memory", "host", "launch", "waiting", "copy", "communication")
"""What a phase's time goes to. waiting: for a slower accelerator. launch, copy, communication: what nothing hides."""

KERNELS = ("matmul", "attention", "memory")

PER_TOKEN = ("forward", "backward", "rollout")
"""Phases whose kernels grow with the tokens."""


@dataclass(frozen=True, slots=True)
class Times:
    """How long a step takes.

    parts: (phase, cause) to seconds; they add up to `step`. assumptions: what was taken for granted, a sentence each.
    unknown: keys of the hardware that lack, without which times are too short.
    """

    parts: Mapping[tuple[str, str], Span]
    assumptions: Sequence[str]
    unknown: Sequence[str]

    @property
    def step(self) -> Span:
        """All of it."""
        return sum(self.parts.values(), Span())

    def by_phase(self) -> dict[str, Span]:
        """Sums over causes."""
        return self._sums(0)

    def by_cause(self) -> dict[str, Span]:
        """Sums over phases."""
        return self._sums(1)

    def _sums(self, place: int) -> dict[str, Span]:
        found: dict[str, Span] = defaultdict(Span)
        for key, span in self.parts.items():
            found[key[place]] += span
        return dict(found)


@dataclass(frozen=True, slots=True)
class _Message:
    """Equal messages beside kernels: a collective's, or copies between an accelerator and its host."""

    name: str
    span: Span
    count: float
    hides: bool


def times(trace: Trace, hardware: Hardware, backend: str = "") -> Times:
    """How long the step of a trace takes on such hardware. backend: `nccl` or `gloo`; empty: the hardware's."""
    known = efficiency_of(hardware.kind, hardware.title)
    trace = replace(trace, work=offloaded(trace))
    parts: dict[tuple[str, str], Span] = {}
    for phase in dict.fromkeys((*(one.phase for one in trace.work), *(one.phase for one in trace.collectives))):
        work = [one for one in trace.work if one.phase == phase]
        sent = [_collective(one, hardware, backend) for one in trace.collectives if one.phase == phase]
        several = trace.processes > 1 and hardware.kind != "cpu"
        for cause, span in _phase(work, sent, trace.micro, hardware, known, several).items():
            if span.high > 0:
                parts[phase, cause] = span
    return Times(parts, _assumptions(trace, hardware, known), _unknown(trace, hardware))


def scaled(trace: Trace, tokens: float, lengths: float = 1.0) -> Trace:
    """The trace of so many times the tokens, in rows so many times as long: a mean batch's from that of the longest.

    What hangs on tokens is taken so many times, attention also by the rows' length; messages and updates stay.
    """

    def grown(one: Work) -> Work:
        times = tokens * (lengths if one.kind == "attention" else 1.0) if one.phase in PER_TOKEN else 1.0
        return replace(one, count=one.count * times)

    counted = {name: round(getattr(trace, name) * tokens) for name in ("tokens", "targets")}
    return replace(trace, work=[grown(one) for one in trace.work], **counted)


def _phase(
    work: Sequence[Work], sent: Sequence[_Message], micro: int, hardware: Hardware, known: Efficiency, several: bool
) -> dict[str, Span]:
    """Seconds of a phase by cause."""
    found: dict[str, Span] = defaultdict(Span)
    copies = []
    for one in work:
        span = kernels.seconds(one, hardware, known)
        if one.kind == "copy":
            copies.append(_Message(one.kind, span, one.count, tuple(one.shape) == HIDDEN))
        else:
            found[one.kind if one.kind in CAUSES else "memory"] += span * one.count
    found["waiting"] = Span(0.0, UNEVEN * sum(found[kind].high for kind in KERNELS) if several else 0.0)
    busy = sum(found.values(), Span())
    issued = sum(one.count for one in work if one.kind not in ("copy", "host")) * 1e-6
    found["launch"] = Span(max(0.0, issued * known.issue[1] - busy.low), max(0.0, issued * known.issue[0] - busy.high))
    busy += found["launch"]
    cores = hardware.kind == "cpu"
    found["communication"] = _uncovered(sent, busy, micro, BESIDE, cores)
    found["copy"] = _uncovered(copies, busy, micro, 0.0, cores)
    return found


def _uncovered(messages: Sequence[_Message], busy: Span, micro: int, slower: float, cores: bool) -> Span:
    """Seconds that messages add to kernels, which are so much slower beside them. cores: they need the kernels' own."""
    hidden = sum((one.span * one.count for one in messages if one.hides), Span())
    bare = sum((one.span * one.count for one in messages if not one.hides), Span())
    low = bare.low + max(0.0, hidden.low - busy.low)
    if cores:
        return Span(low, bare.high + hidden.high)
    ends = 0.0
    for name in {one.name for one in messages if one.hides}:
        longest = max((one for one in messages if one.hides and one.name == name), key=lambda one: one.span.high)
        ends += longest.span.high * min(micro, longest.count)
    rest = hidden.high - ends
    slowed = busy.high + slower * min(rest, busy.high)
    return Span(low, max(low, bare.high + ends + max(slowed, rest) - busy.high))


def _collective(one: Collective, hardware: Hardware, backend: str) -> _Message:
    spans = wire.seconds(one, hardware, backend)
    return _Message(one.operation, Span(*(x if math.isfinite(x) else 0.0 for x in spans)), one.count, one.hidden)


def _unknown(trace: Trace, hardware: Hardware) -> list[str]:
    groups = [(one.ranks, {rank // hardware.per_node for rank in one.ranks}) for one in trace.collectives]
    inside = any(len(nodes) < len(ranks) for ranks, nodes in groups)
    kinds = {one.kind for one in trace.work}
    needed = {
        "tflops": (bool(kinds & {"matmul", "attention"}), bool(hardware.tflops)),
        "memory_gb_per_second": (bool(kinds), hardware.memory_gb_per_second > 0),
        "inside.gb_per_second": (inside, hardware.inside.gb_per_second > 0),
        "between.gb_per_second": (any(len(nodes) > 1 for _, nodes in groups), hardware.between.gb_per_second > 0),
        "host.gb_per_second": ("copy" in kinds, hardware.host.gb_per_second > 0),
    }
    return [f"hardware.{key}" for key, (needs, has) in needed.items() if needs and not has]


def _assumptions(trace: Trace, hardware: Hardware, known: Efficiency) -> list[str]:
    most = max((one for one in trace.work if one.kind == "matmul"), key=lambda one: one.flops * one.count, default=None)
    (ordinary, best), (slow, quick) = kernels.shares(most.dtype if most else "bf16", known), known.memory
    found = [
        f"matmuls reach {ordinary:.0%} to {best:.0%} of the peak where they fill it, memory {slow:.0%} to {quick:.0%}: "
        "what was published of kernels (planner/efficiency.py has the sources)",
        "reading data, logging and evaluation take no time that is seen",
    ]
    if trace.processes > 1 and hardware.kind != "cpu":
        found.append(f"in the ordinary all wait for an accelerator that is {UNEVEN:.0%} slower than the one measured")
    if any(len(one.ranks) > 1 for one in trace.collectives):
        ends = f"the longest of each kind is not, and kernels beside others take {BESIDE:.1%} longer"
        ordinary_case = "none is" if hardware.kind == "cpu" else ends
        found.append(f"at best every message that may be hidden is; in the ordinary {ordinary_case}")
    if any(one.kind == "host" for one in trace.work):
        found.append(f"a node's CPUs move {HOST_BANDWIDTH[0]:.0f} to {HOST_BANDWIDTH[1]:.0f} GB/s while they optimise")
    return [*found, *known.assumed]
