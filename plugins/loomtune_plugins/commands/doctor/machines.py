"""What is wrong with single nodes, or with one against the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from loomtune_plugins.commands.doctor.findings import FAULT, WARNING, Answers, Finding, names, odd_ones, usual

GIB = 1 << 30
OPEN_FILES = 4096
LOCKED = 1 * GIB
SCARCE, FULL = 20 * GIB, 1 * GIB
"""Free bytes of the run's folder below which a checkpoint of a large model, or of any, finds no room."""

SHARED_MEMORY = 1 * GIB
SLOW_DISK = 50e6
SLOW_ANSWER = 0.05
HOT = 88
"""Degrees Celsius: data-centre GPUs slow down at about 90."""


def machines(answers: Answers) -> Iterator[Finding]:
    """All findings of this file."""
    yield from versions(answers)
    yield from sources(answers)
    yield from limits(answers)
    yield from processors(answers)
    yield from memory(answers)
    yield from disks(answers)
    yield from seeing(answers)


def versions(answers: Answers) -> Iterator[Finding]:
    """What is installed, and set in the environment, in one way on most ranks and otherwise on some."""
    facts = answers.said.get("facts", {})
    for kind, level, cure in (
        ("versions", FAULT, "install the same distributions, from the same image or lock file, on every node"),
        (
            "environment",
            WARNING,
            "set it the same everywhere, by launcher.environment rather than by profiles",
        ),
    ):
        keys = sorted({key for of in facts.values() for key in of[kind]})
        for key in keys:
            values = {str(rank): of[kind].get(key, "absent") for rank, of in facts.items()}
            yield from _odd(answers, key, values, level, cure)


def _odd(answers: Answers, key: str, values: dict[str, Any], level: str, cure: str) -> Iterator[Finding]:
    """One finding a key, naming nodes by value."""
    others: dict[str, list[str]] = {}
    for rank, value in odd_ones(values).items():
        others.setdefault(str(value), []).append(answers.node(int(rank)))
    if others:
        told = "; ".join(f"{value} on {names(nodes)}" for value, nodes in others.items())
        yield Finding(level, f"{key} is {usual(values)} on most ranks, but {told}", cure)


def sources(answers: Answers) -> Iterator[Finding]:
    """Other files under the same version."""
    found = {name: of["sources"] for name, of in answers.of_nodes("facts").items() if of["sources"]}
    if odd := odd_ones(found):
        what = f"loomtune's own files differ on {names(odd)} from those of the other nodes"
        yield Finding(FAULT, what, "check out the same commit, or install the same wheel, on every node")


def limits(answers: Answers) -> Iterator[Finding]:
    """Open files, and locked memory where there is InfiniBand to use it."""
    found = {name: of["limits"] for name, of in answers.of_nodes("facts").items()}
    if low := [name for name, of in found.items() if 0 <= of["open files"] < OPEN_FILES]:
        what = f"at most {found[low[0]]['open files']} open files on {names(low)}: data loaders and sockets need more"
        yield Finding(WARNING, what, "ulimit -n 65536 (LimitNOFILE of slurmd or sshd, --ulimit of containers)")
    if low := [name for name, of in found.items() if of["infiniband"] and 0 <= of["locked memory"] < LOCKED]:
        what = f"InfiniBand, but at most {found[low[0]]['locked memory']} bytes of locked memory on {names(low)}"
        yield Finding(FAULT, what, "ulimit -l unlimited (LimitMEMLOCK of slurmd or sshd, --ulimit memlock=-1)")


def processors(answers: Answers) -> Iterator[Finding]:
    """More threads than cores; unequal cores."""
    found = answers.by_node("facts")
    crowded = {}
    for name, ranks in found.items():
        threads, there = sum(of["threads"] for of in ranks.values()), cores(ranks)
        if threads > there:
            crowded[name] = f"{threads} threads of {len(ranks)} processes on {there:g} cores"
    if crowded:
        name, told = next(iter(crowded.items()))
        what = f"more CPU threads than cores on {names(crowded)} ({name}: {told})"
        yield Finding(WARNING, what, "set launcher.threads, or OMP_NUM_THREADS, to cores / processes of a node")
    counts = {name: cores(ranks) for name, ranks in found.items()}
    if odd := odd_ones(counts):
        what = (
            f"{usual(counts):g} cores on most nodes, but {', '.join(f'{of:g} on {name}' for name, of in odd.items())}"
        )
        yield Finding(WARNING, what, "ask for equal nodes: the slowest sets the pace of all")


def cores(ranks: Mapping[int, Any]) -> float:
    """Of a node: those of all its ranks, which may each be bound to some; no more than the control group gives."""
    bits = 0
    for of in ranks.values():
        bits |= int(of["affinity"], 16)
    quotas: list[float] = [of["quota"] for of in ranks.values() if of["quota"]]
    return min([float(bits.bit_count()), *quotas])


def memory(answers: Answers) -> Iterator[Finding]:
    """Little left, swap in use, a node with far less than the others."""
    found = {name: of["memory"] for name, of in answers.of_nodes("facts").items()}
    if low := [name for name, of in found.items() if of["available"] < of["total"] / 10]:
        yield Finding(WARNING, f"less than a tenth of the memory is free on {names(low)}", "end what else runs there")
    if used := [name for name, of in found.items() if of["swap"] > GIB]:
        yield Finding(
            WARNING, f"more than 1 GiB of swap in use on {names(used)}", "end what else runs there; swapoff -a"
        )
    typical = median([of["total"] for of in found.values()] or [0])
    if small := [name for name, of in found.items() if of["total"] < 0.9 * typical]:
        what = f"{found[small[0]]['total'] / GIB:.0f} GiB of memory on {names(small)}, {typical / GIB:.0f} on others"
        yield Finding(WARNING, what, "ask for equal nodes: the smallest decides what fits")


def disks(answers: Answers) -> Iterator[Finding]:
    """Places that cannot be written to, are full, or are slow."""
    found = answers.of_nodes("disks")
    for place in dict.fromkeys(place for of in found.values() for place in of):
        at = {name: of[place] for name, of in found.items() if place in of}
        for name, of in at.items():
            if "error" in of:
                what = f"the {place} {of['path']} cannot be written to on {name}: {of['error']}"
                yield Finding(FAULT, what, "mount it there, with rights to write, or name another place")
        yield from _room(place, {name: of for name, of in at.items() if "error" not in of})


def _room(place: str, at: Mapping[str, Any]) -> Iterator[Finding]:
    if place == "shared memory":
        if low := [name for name, of in at.items() if of["free"] < SHARED_MEMORY]:
            what = f"less than 1 GiB free in /dev/shm on {names(low)}: NCCL and data loaders share memory there"
            yield Finding(WARNING, what, "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory")
        return
    for level, bound in ((FAULT, FULL), (WARNING, SCARCE)):
        above = FULL if level == WARNING else 0
        if low := [name for name, of in at.items() if above <= of["free"] < bound]:
            what = f"{_room_left(at[low[0]]['free'])} free for the {place} {at[low[0]]['path']} on {names(low)}"
            yield Finding(level, what, "make room, or name another place by run.dir or LOOMTUNE_CACHE")
    yield from _pace(place, {name: of["written"] for name, of in at.items() if of["written"]}, at)


def _room_left(free: int) -> str:
    return f"{free / GIB:.1f} GiB" if free >= GIB else f"{free >> 20} MiB"


def _pace(place: str, speeds: Mapping[str, float], at: Mapping[str, Any]) -> Iterator[Finding]:
    typical = median(speeds.values()) if speeds else 0.0
    if lame := [name for name, speed in speeds.items() if speed < typical / 3]:
        what = f"the {place} takes {speeds[lame[0]] / 1e6:.0f} MB/s on {names(lame)}, {typical / 1e6:.0f} on others"
        yield Finding(WARNING, what, "look at that node's mount, disk and network")
    elif speeds and typical < SLOW_DISK:
        what = f"the {place} is written at {typical / 1e6:.0f} MB/s a node"
        cures = {"run folder": "save less often (checkpoint.every), or name a quicker file system by run.dir"}
        yield Finding(WARNING, what, cures.get(place, "name a quicker file system by LOOMTUNE_CACHE"))
    if lame := [name for name, of in at.items() if of["opened"] > SLOW_ANSWER]:
        what = f"a file of the {place} takes {at[lame[0]]['opened'] * 1e3:.0f} ms to make on {names(lame)}"
        yield Finding(WARNING, what, "the file system's server is far away or busy: put the cache on a local disk")


def seeing(answers: Answers) -> Iterator[Finding]:
    """Nodes that do not see what others wrote, by who sees whom."""
    first = answers.said.get("seeing", {})
    if not any(of["unseen"] for of in first.values()):
        again = answers.said.get("seeing again", {})
        if stale := [answers.node(rank) for rank, of in again.items() if of["unseen"]]:
            what = f"{names(stale)} still read old content of the run folder's files after others replaced them"
            yield Finding(FAULT, what, "mount it with close-to-open consistency (NFS: no `nocto`, a small `actimeo`)")
        return
    apart = alone(answers, {rank: set(of["unseen"]) for rank, of in first.items()})
    what = f"the run folder is not one folder for all: {names(apart)} and the other nodes do not see each other's files"
    yield Finding(FAULT, what, "mount the same file system there, and name a folder of it by run.dir")


def alone(answers: Answers, unseen: Mapping[int, set[int]]) -> list[str]:
    """Nodes outside the largest set that see each other; of equally large ones, outside rank 0's."""
    groups: list[set[int]] = []
    for rank in unseen:
        for group in groups:
            if all(rank not in unseen[other] and other not in unseen[rank] for other in group):
                group.add(rank)
                break
        else:
            groups.append({rank})
    most = max(groups, key=len)
    return list(dict.fromkeys(answers.node(rank) for rank in unseen if rank not in most))
