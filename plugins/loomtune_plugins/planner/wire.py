"""From the collectives of a step to bytes on links: inside a node, between nodes, by rank, by node and in all.

Bytes are payload: what the backend puts around it is `framing`; the headers of TCP/IP are neither (66 bytes a packet,
`tests/labs/wire.py`). Ranks are numbered node by node. A rank's trace names its own groups; those of the other ranks
are the same, moved, so that they fill the world.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from loomtune.settings import Hardware
from loomtune_plugins.planner import gloo, nccl
from loomtune_plugins.planner.trace import Collective, Trace


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that are sent to ranks of the same node, and to those of others."""

    inside: float = 0.0
    between: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.inside + self.between

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.inside + other.inside, self.between + other.between)

    def __mul__(self, times: float) -> Flow:
        return Flow(self.inside * times, self.between * times)


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's collectives of a kind: how many, and what it sends for them."""

    count: float
    flow: Flow


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a step sends.

    rank: by the trace's rank. nodes: by all ranks of each node, in order. framing: the backend's own bytes around it.
    messages: that the rank sends. collectives: that it takes part in, those with nobody else left out.
    by: (operation, phase) to the rank's share.
    """

    rank: Flow
    nodes: tuple[Flow, ...]
    framing: tuple[Flow, ...]
    messages: float
    collectives: float
    by: Mapping[tuple[str, str], Share]

    @property
    def total(self) -> Flow:
        """By all ranks."""
        return sum(self.nodes, Flow())


def backend_of(hardware: Hardware) -> str:
    """Which backend loomtune's processes meet with on such accelerators."""
    return "gloo" if hardware.kind == "cpu" else "nccl"


def traffic(trace: Trace, per_node: int, backend: str) -> Traffic:
    """What the step of a trace sends, with so many ranks in a node. backend: `nccl` or `gloo`."""
    count = -(-trace.processes // per_node)
    nodes, framing = [Flow()] * count, [Flow()] * count
    by: dict[tuple[str, str], Share] = {}
    messages = collectives = 0.0
    for one in trace.collectives:
        if len(one.ranks) < 2:
            continue
        sent = _sent(backend, one.operation, one.bytes, _item(one.dtype), one.ranks, trace.processes, per_node)
        for rank, flow in sent.ranks.items():
            nodes[rank // per_node] += flow * one.count
        for rank, flow in sent.framing.items():
            framing[rank // per_node] += flow * one.count
        mine = sent.ranks.get(trace.rank, Flow()) * one.count
        before = by.get((one.operation, one.phase), Share(0.0, Flow()))
        by[one.operation, one.phase] = Share(before.count + one.count, before.flow + mine)
        messages += one.count * sent.messages.get(trace.rank, 0.0)
        collectives += one.count
    whole = sum((share.flow for share in by.values()), Flow())
    return Traffic(whole, tuple(nodes), tuple(framing), messages, collectives, by)


def seconds(collective: Collective, hardware: Hardware, backend: str = "") -> tuple[float, float]:
    """How long one message of a collective takes with the links to itself: a low and a high bound.

    Infinite where the speed of a link that it needs is not known. backend: that of the hardware, if it is not said.
    """
    if len(collective.ranks) < 2:
        return 0.0, 0.0
    backend = backend or backend_of(hardware)
    item = _item(collective.dtype)
    most = _most(backend, collective.operation, collective.bytes, item, collective.ranks, hardware.per_node)
    nodes = tuple(rank // hardware.per_node for rank in collective.ranks)
    if backend == "nccl":
        return nccl.seconds(collective.operation, most, nodes, hardware)
    links = hardware.inside, hardware.between
    moving = max(nccl.transfer(bytes, link.gb_per_second) for bytes, link in zip(most, links, strict=True))
    wait = hardware.between.microseconds if len(set(nodes)) > 1 else hardware.inside.microseconds
    waits = gloo.rounds(collective.operation, collective.bytes, item, len(nodes)) * wait * 1e-6
    return moving + waits, moving / nccl.BETWEEN[1] + 2 * waits


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a collective makes all ranks of the world send."""

    ranks: Mapping[int, Flow]
    framing: Mapping[int, Flow]
    messages: Mapping[int, float]


@lru_cache(maxsize=4096)
def _sent(
    backend: str, operation: str, size: int, item: int, ranks: tuple[int, ...], processes: int, per_node: int
) -> _Sent:
    flows: dict[int, Flow] = defaultdict(Flow)
    framing: dict[int, Flow] = defaultdict(Flow)
    messages: dict[int, float] = defaultdict(float)
    for group in groups(ranks, processes):
        nodes = tuple(rank // per_node for rank in group)
        for a, b, bytes, number in _edges(backend, operation, size, item, nodes):
            near = nodes[a] == nodes[b]
            flows[group[a]] += _flow(near, bytes)
            messages[group[a]] += number
            if backend == "gloo":  # to announce it and to begin it; the other says that it is ready
                framing[group[a]] += _flow(near, 2 * gloo.PREAMBLE * number)
                framing[group[b]] += _flow(near, gloo.PREAMBLE * number)
    return _Sent(dict(flows), dict(framing), dict(messages))


@lru_cache(maxsize=4096)
def _most(
    backend: str, operation: str, size: int, item: int, ranks: tuple[int, ...], per_node: int
) -> tuple[float, float]:
    """The most bytes that a rank sends or receives in one collective, inside its node and beyond."""
    nodes = tuple(rank // per_node for rank in ranks)
    moved: dict[tuple[int, bool, bool], float] = defaultdict(float)
    for a, b, bytes, _ in _edges(backend, operation, size, item, nodes):
        near = nodes[a] == nodes[b]
        moved[a, True, near] += bytes
        moved[b, False, near] += bytes
    inside, between = (max((n for key, n in moved.items() if key[2] is near), default=0.0) for near in (True, False))
    return inside, between


@lru_cache(maxsize=4096)
def _edges(backend: str, operation: str, size: int, item: int, nodes: tuple[int, ...]) -> tuple[gloo.Edge, ...]:
    if backend == "gloo":
        return tuple(gloo.edges(operation, size, item, len(nodes)))
    assert backend == "nccl", f"{backend} is no backend of loomtune's"
    return tuple(nccl.edges(operation, size, nodes))


@lru_cache(maxsize=1024)
def groups(ranks: tuple[int, ...], processes: int) -> tuple[tuple[int, ...], ...]:
    """The groups of all ranks that are like a given one: it, moved, until every rank is in one.

    A group that does not fill the world so stands alone.
    """
    offsets = [rank - min(ranks) for rank in ranks]
    taken: set[int] = set()
    found = []
    for first in range(processes):
        if first in taken:
            continue
        moved = tuple(first + offset for offset in offsets)
        if max(moved) >= processes or taken.intersection(moved):
            return (ranks,)
        taken.update(moved)
        found.append(moved)
    return tuple(found)


def _flow(near: bool, bytes: float) -> Flow:
    return Flow(inside=bytes) if near else Flow(between=bytes)


def _item(dtype: str) -> int:
    """Bytes of a number: of `torch.bfloat16` 2, of `bool` 1."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits.group()) // 8) if bits else 1
