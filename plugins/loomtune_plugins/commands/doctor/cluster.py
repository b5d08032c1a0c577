"""What is wrong between nodes, with their GPUs, and with the examination itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, median_high, median_low
from typing import Any

from loomtune_plugins.commands.doctor.findings import FAULT, WARNING, Answers, Finding, names, odd_ones, usual
from loomtune_plugins.commands.doctor.machines import HOT

CLOCK_FAULT, CLOCK_WARNING = 1.0, 0.1
LAME, LIMPING = 0.5, 0.75
"""Shares of what is usual below which a node is slow, or seems so."""

SILENT = "said nothing any more"

SLOW_LINK = 1e9 / 8
FAR = 5.0
"""How many times the usual latency is much."""


def cluster(answers: Answers) -> Iterator[Finding]:
    """All findings of this file but those of `lost`."""
    yield from clocks(answers)
    yield from interfaces(answers)
    yield from links(answers)
    yield from graphics(answers)


def lost(answers: Answers, troubles: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> Iterator[Finding]:
    """Ranks and nodes that did not come, or did not come to the end of a step."""
    if (asked := expected.get("nodes", 0)) > len(answers.nodes):
        what = f"{len(answers.nodes)} of {asked} nodes came: {names(answers.nodes)}"
        yield Finding(FAULT, what, "start the others' agents; every node must reach the rendezvous' host and port")
    procs = expected.get("procs", 0)
    for name, ranks in answers.nodes.items():
        if len(ranks) < procs:
            what = f"{len(ranks)} of {procs} ranks came on {name}"
            yield Finding(
                FAULT, what, f"look at what its ranks printed; {name} may lack memory, or files of the environment"
            )
    for trouble in sorted(troubles, key=lambda trouble: trouble["error"] != SILENT):  # the others only waited for them
        yield _trouble(answers, trouble)


def _trouble(answers: Answers, trouble: Mapping[str, Any]) -> Finding:
    phase, ranks, error = trouble["phase"], trouble["ranks"], trouble["error"]
    if phase == "coming":
        what = f"rank {', '.join(map(str, ranks))} of {_about(answers, ranks)} did not come: {error}"
        return Finding(FAULT, what, "look at what they printed; every node must reach rank 0's host and port")
    where = ", ".join(f"rank {rank} ({answers.node(rank)})" for rank in ranks[:8])
    network = ("group", "clocks", "collectives", "pairs")
    cure = "look at what these ranks printed"
    if phase in network:
        cure = "open all ports between the nodes, and name the right interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
    if error == SILENT:
        cure = "see whether the node lives and can be reached, and what its ranks printed"
    return Finding(FAULT, f"{phase}: {where}: {error}", cure)


def _about(answers: Answers, ranks: Sequence[int]) -> str:
    """The nodes of ranks that did not come, as far as others of theirs did: torchrun numbers ranks node by node."""
    size = max(map(len, answers.nodes.values()), default=1)
    known = {rank // size: name for name, of in answers.nodes.items() for rank in of}
    return names(known.get(rank // size, f"node {rank // size}") for rank in ranks)


def clocks(answers: Answers) -> Iterator[Finding]:
    """Clocks by their offset from the middle one, so that rank 0 may be the one that is wrong."""
    ahead = offsets(answers)
    for name, (offset, uncertainty) in ahead.items():
        sure = abs(offset) - uncertainty
        if sure > CLOCK_WARNING:
            level = FAULT if sure > CLOCK_FAULT else WARNING
            way = "ahead of" if offset > 0 else "behind"
            what = f"the clock of {name} is {abs(offset):.3f} s (± {uncertainty:.3f}) {way} the others"
            yield Finding(level, what, "run chrony or ntpd there: logs merge by time, and tokens expire by it")


def offsets(answers: Answers) -> dict[str, tuple[float, float]]:
    """Node to the seconds by which its clock is ahead of the middle of all, and how far off that may be."""
    found = {name: of for name, of in answers.of_nodes("clocks").items() if of}
    if not found:
        return {}
    first = next(iter(answers.nodes))
    ahead = {first: 0.0, **{name: -of["offset"] for name, of in found.items()}}
    middle = median(ahead.values())
    return {
        name: (value - middle, found[name]["uncertainty"] if name in found else 0.0) for name, value in ahead.items()
    }


def interfaces(answers: Answers) -> Iterator[Finding]:
    """Host names that lead to the node itself, and interfaces of different names."""
    found = {name: of["interface"] for name, of in answers.of_nodes("facts").items()}
    if len(found) < 2:
        return
    if loops := [name for name, of in found.items() if of["loopback"] and not of["named"]]:
        towards = found[loops[0]]["towards rank 0"] or "eth0"
        what = f"the host name of {names(loops)} resolves to the loopback address, at which no other node finds it"
        yield Finding(FAULT, what, f"set launcher.environment.GLOO_SOCKET_IFNAME={towards}, or mend /etc/hosts there")
    taken = {name: of["gloo"] for name, of in found.items()}
    if odd := odd_ones(taken):
        told = ", ".join(f"{of or 'none'} on {name}" for name, of in odd.items())
        what = f"gloo takes the interface {usual(taken)} on most nodes, but {told}"
        yield Finding(WARNING, what, "name them by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or check the routes")


def links(answers: Answers) -> Iterator[Finding]:
    """Nodes whose links are slow against those of the others, and links that are slow altogether."""
    bandwidths, latencies = scores(answers, "bandwidth", median_high), scores(answers, "latency", median_low)
    if not bandwidths:
        return
    typical = median_high(bandwidths.values())
    for level, below, above in ((FAULT, LAME, 0.0), (WARNING, LIMPING, LAME)):
        if slow := [name for name, score in bandwidths.items() if above * typical <= score < below * typical]:
            told = ", ".join(f"{name} ({bandwidths[name] / 1e6:.1f} MB/s)" for name in slow)
            what = f"slow network: {told}; other nodes have {typical / 1e6:.1f} MB/s: all wait for the slowest"
            yield Finding(level, what, "look at its link speed (ethtool), cable and switch port, or leave it out")
    usually = median_low(latencies.values())
    if far := [name for name, score in latencies.items() if score > FAR * usually and score > 1e-4]:
        what = f"{latencies[far[0]] * 1e6:.0f} µs to {names(far)}, {usually * 1e6:.0f} µs among the others"
        yield Finding(WARNING, what, "ask for nodes of one switch or placement group; look for power saving there")
    if typical < SLOW_LINK:
        what = f"{typical / 1e6:.1f} MB/s between nodes: sharded weights would hardly move"
        yield Finding(
            WARNING, what, "name the fast interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or shard within nodes"
        )


def scores(answers: Answers, what: str, middle: Any) -> dict[str, float]:
    """Node to the middle of its pairs.

    A pair is as slow as the slower of its two. The upper middle of bandwidths (lower of latencies) is that of a good
    node as long as at most half of its partners are bad: it is not blamed for a bad one that it talks to.
    """
    nodes = list(answers.nodes)
    found: dict[str, list[float]] = {}
    for lines in answers.said.get("pairs", {}).values():
        for line in lines:
            for node in line["nodes"]:
                found.setdefault(nodes[node], []).append(line[what])
    return {name: middle(values) for name, values in sorted(found.items())}


def graphics(answers: Answers) -> Iterator[Finding]:
    """GPUs that are missing, ill, hot, throttled, slow or apart."""
    found = answers.of_nodes("graphics")
    for key, what in (("count", "GPUs"), ("kinds", "kinds of GPU")):
        values = {name: of["count"] if key == "count" else _kinds(of) for name, of in found.items()}
        if odd := odd_ones(values):
            told = ", ".join(f"{of or 'none'} on {name}" for name, of in odd.items())
            cure = "look at nvidia-smi there: a GPU may have fallen off the bus; else ask for equal nodes"
            yield Finding(FAULT if key == "count" else WARNING, f"{what}: {usual(values) or 'none'}, but {told}", cure)
    drivers = {name: of["gpus"][0]["driver_version"] for name, of in found.items() if of.get("gpus")}
    if odd := odd_ones(drivers):
        told = ", ".join(f"{of} on {name}" for name, of in odd.items())
        yield Finding(WARNING, f"driver {usual(drivers)}, but {told}", "install the same driver on every node")
    for name, of in found.items():
        yield from _health(name, of)
    yield from _speeds(answers)


def _kinds(of: Mapping[str, Any]) -> str:
    return ", ".join(sorted({gpu["name"] for gpu in of["gpus"] or ()}))


def _health(name: str, of: Mapping[str, Any]) -> Iterator[Finding]:
    """What nvidia-smi and the kernel say of a node's GPUs."""
    away = "drain the node; reset the GPU or have it replaced"
    for gpu in of["gpus"] or ():
        which = f"GPU {gpu['index']} of {name}"
        if _number(gpu, "ecc.errors.uncorrected.volatile.total"):
            yield Finding(FAULT, f"{which} has had memory errors (ECC) that could not be corrected", away)
        if gpu.get("remapped_rows.failure") in ("Yes", "1"):
            yield Finding(FAULT, f"{which} has no spare memory rows left", away)
        if gpu.get("remapped_rows.pending") in ("Yes", "1"):
            yield Finding(
                WARNING, f"{which} will put aside bad memory rows at its next reset", "reset it before the run"
            )
        if _number(gpu, "temperature.gpu") >= HOT:
            yield Finding(
                WARNING, f"{which} is at {gpu['temperature.gpu']} °C", "look at cooling, and at what runs on it"
            )
        held = [field.rpartition(".")[2] for field, value in gpu.items() if "throttle" in field and value == "Active"]
        if held:
            yield Finding(WARNING, f"{which} is throttled: {', '.join(held)}", "look at cooling and power supply")
    if of.get("xid"):
        yield Finding(
            WARNING, f"the kernel of {name} has reports of its GPUs: {of['xid'][-1]}", "look Xid up; drain the node"
        )
    if of.get("peers"):
        what = f"GPUs of {name} cannot read each other's memory: {of['peers'][:4]}"
        yield Finding(WARNING, what, "turn off ACS and IOMMU in the firmware, or let containers see all GPUs")


def _number(gpu: Mapping[str, str], field: str) -> int:
    """0 where it is not told (`[N/A]`)."""
    said = gpu.get(field, "")
    return int(said) if said.isdigit() else 0


def _speeds(answers: Answers) -> Iterator[Finding]:
    speeds = {rank: of["flops"] for rank, of in answers.said.get("graphics", {}).items() if "flops" in of}
    typical = median(speeds.values()) if speeds else 0.0
    for rank, speed in speeds.items():
        if speed < 0.85 * typical:
            which = f"rank {rank}'s GPU on {answers.node(rank)}"
            what = f"{which} multiplies at {speed / 1e12:.0f} TFLOP/s, others at {typical / 1e12:.0f}"
            level = FAULT if speed < 0.7 * typical else WARNING
            yield Finding(level, what, "look at its clocks, power limit and temperature; leave the node out")
