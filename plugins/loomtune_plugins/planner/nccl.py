"""What NCCL sends (and RCCL, its sibling), and how long it takes by NCCL's own model.

Rings, as all_gather and reduce_scatter take (but for one accelerator a node: PAT) and large all_reduces mostly do
(`doc/PERFORMANCE.md` of nccl-tests; Hu et al. 2025, arXiv:2507.04786). A tree sends what an all_reduce sums up and
down once: of a tensor S, a node 2 (nodes - 1) / nodes S where a ring sends 2 (ranks - 1) / ranks S. NVLink SHARP, which
adds up in the switch, sends half as many bytes inside a node. Neither is taken off: the bytes are an upper bound.

There is one ring for each network card, so for each accelerator of a node: each leaves the node elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loomtune.settings import Hardware
from loomtune_plugins.planner.gloo import Edge

HANDS_ON = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "barrier": 2}
"""How often a ring hands on all that is not a rank's own."""

DIRECT = ("all_to_all", "gather", "scatter", "send", "receive")


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a message is cut: fewer bytes that count, and less waiting for each hop. Microseconds."""

    share: float
    base: float
    inside: float
    between: float
    overheads: int


PROTOCOLS = (Protocol(0.5, 6.6, 0.6, 2.7, 1), Protocol(0.92, 14.0, 1.9, 4.0, 1), Protocol(1.0, 8.4, 3.4, 14.0, 3))
"""LL, LL128, Simple: NCCL's own model of a ring (`src/graph/tuning.cc` at 5067397, `ncclTunerConstantsDefaults`)."""

TREES = (Protocol(0.24, 6.8, 0.6, 5.0, 0), Protocol(0.86, 14.0, 1.25, 8.5, 0), Protocol(0.92, 8.4, 4.0, 14.0, 0))
"""The same of a tree, which only all_reduce takes."""

OVERHEAD = (1.0, 2.0)
"""Microseconds until a message is posted to a network card, on hosts of Intel and of AMD (`getNetOverhead`)."""

INSIDE = (370 / 450, 311 / 450)
"""Of NVLink's bytes a second, the share that a ring reaches among 8 H100: with gigabytes (NVIDIA/nccl, issue 1455),
and with 128 MiB (issue 1047). NCCL itself plans with 20.6 of a link's 25 GB/s (`src/graph/topo.h`)."""

BETWEEN = (48 / 50, 320 / 400)
"""Of a network card's: the most that is to be expected of 400 Gb/s (NVIDIA/nccl-tests, issue 290), and what a ring over
16 nodes of 8 H100 had (NVIDIA/nccl, issue 1229; the latencies above explain most of the way from 4 nodes to 128)."""

SHARP = (450.0, 480 / 450, 25.0)
"""From which GB/s on NVLink's switch adds up, the share that an all_reduce of more than four then reaches (issue 1455),
and its microseconds (`tuning.cc`)."""


def edges(operation: str, size: float, nodes: Sequence[int]) -> Iterator[Edge]:
    """What a group sends. size: bytes of the whole tensor. nodes: on which each of the group's ranks is.

    Raises AssertionError for an operation that is not known.
    """
    group = len(nodes)
    if group == 1:
        return
    if operation in DIRECT:
        yield from _direct(operation, size, group)
        return
    rings = list(_rings(nodes))
    if operation in HANDS_ON:
        times = HANDS_ON[operation] * (group - 1)
        size = size or 4.0  # a barrier is an all_reduce of one number
        for ring in rings:
            for a, b in zip(ring, (*ring[1:], ring[0]), strict=True):
                yield a, b, times / group * size / len(rings), times / len(rings)
        return
    assert operation in {"broadcast", "reduce"}, f"NCCL does not know {operation}"
    for ring in rings:
        first = ring.index(0)
        chain = [*ring[first:], *ring[:first]]
        pairs = itertools.pairwise(chain)
        for a, b in pairs if operation == "broadcast" else ((b, a) for a, b in pairs):
            yield a, b, size / len(rings), 1 / len(rings)


def _direct(operation: str, size: float, group: int) -> Iterator[Edge]:
    """Each pair for itself."""
    if operation in {"send", "receive"}:
        yield (0, 1, size, 1) if operation == "send" else (1, 0, size, 1)
        return
    for a in range(group):
        for b in range(group):
            if a != b and (operation == "all_to_all" or (b if operation == "gather" else a) == 0):
                yield a, b, size / group, 1


def _rings(nodes: Sequence[int]) -> Iterator[list[int]]:
    """Rings of places, ordered by node; each leaves a node, and comes into it, at another rank."""
    held: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        held.setdefault(node, []).append(place)
    for turn in range(min(len(places) for places in held.values())):
        yield [place for places in held.values() for place in (*places[turn:], *places[:turn])]


def seconds(operation: str, sent: tuple[float, float], nodes: Sequence[int], hardware: Hardware) -> tuple[float, float]:
    """A low and a high bound: the quickest protocol, on links at their best and at their ordinary share.

    sent: the most bytes that a rank sends or receives (inside, between). Infinite where a link's speed is not known.
    """
    return _least(operation, sent, nodes, hardware, 0), _least(operation, sent, nodes, hardware, 1)


def _least(operation: str, sent: tuple[float, float], nodes: Sequence[int], hardware: Hardware, bound: int) -> float:
    speeds = INSIDE[bound] * hardware.inside.gb_per_second, BETWEEN[bound] * hardware.between.gb_per_second
    moving = max(transfer(bytes, speed) for bytes, speed in zip(sent, speeds, strict=True))
    group, many = len(nodes), len(set(nodes))

    def takes(protocol: Protocol, inside: float, between: float) -> float:
        overhead = protocol.overheads * OVERHEAD[bound] if many > 1 else 0.0
        waits = inside * max(protocol.inside, overhead, hardware.inside.microseconds)
        waits += between * max(protocol.between, hardware.between.microseconds)
        return (protocol.base + waits) * 1e-6 + moving / protocol.share

    times = HANDS_ON.get(operation, 1)
    hops = times * (group - 1) if operation not in DIRECT else bound * (group - 1) or 1
    outside = times * (many - 1) if operation not in DIRECT else min(hops, many - 1)
    found = [takes(protocol, hops - outside, outside) for protocol in PROTOCOLS]
    if HANDS_ON.get(operation) == 2:
        depth = math.log2(many) if many > 1 else 0.0
        found += [takes(tree, 2 * (group // many - 1), 2 * depth) for tree in TREES]
        at, share, base = SHARP
        if not bound and many == 1 and group > 4 and hardware.kind == "cuda" and hardware.inside.gb_per_second >= at:
            found.append(base * 1e-6 + transfer(sent[0], share * hardware.inside.gb_per_second))
    return min(found)


def transfer(bytes: float, gb_per_second: float) -> float:
    """Seconds; infinite where the speed is 0, which is unknown."""
    if not bytes:
        return 0.0
    return bytes / (gb_per_second * 1e9) if gb_per_second else math.inf
