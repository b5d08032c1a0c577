"""The course of an examination: every step is bounded in time, and what does not answer is named and left behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loomtune_plugins.commands.doctor import clocks, collectives, disks, facts, graphics, pairs, seeing
from loomtune_plugins.commands.doctor.board import Board, within
from loomtune_plugins.commands.doctor.cluster import SILENT
from loomtune_plugins.commands.doctor.findings import Answers

SLACK = 5.0
"""Seconds that rank 0 waits for others beyond the end of a step."""

LEAST = 3.0
"""Seconds of a step, even where the time is over: what is left is short, or hangs."""


@dataclass
class Patient:
    """A rank under examination.

    nodes: name to ranks, of those that came. word: what files of this examination hold. until: when it is over.
    hidden: ranks whose files this one does not see. silent: ranks that said nothing any more.
    said, troubles: what rank 0 has heard so far; of a trouble its `phase`, `ranks` and `error`.
    """

    rank: int
    size: int
    local_rank: int
    folder: Path
    quick: bool
    until: float
    nodes: dict[str, list[int]] = field(default_factory=dict)
    word: str = ""
    hidden: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    said: dict[str, dict[int, Any]] = field(default_factory=dict)
    troubles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def answers(self) -> Answers:
        """What was found so far."""
        return Answers(self.nodes, self.said, self.quick)

    @property
    def seconds(self) -> float:
        """Of one measurement."""
        return 0.2 if self.quick else 1.0

    @property
    def ranks(self) -> list[int]:
        """Those that came."""
        return sorted(rank for ranks in self.nodes.values() for rank in ranks)

    @property
    def ranks_left(self) -> list[int]:
        """Those that came and still speak."""
        return [rank for rank in self.ranks if rank not in self.silent]

    @property
    def first(self) -> bool:
        """Whether this is its node's first."""
        return any(self.rank == ranks[0] for ranks in self.nodes.values())

    @property
    def leaders(self) -> list[int]:
        """Each node's first rank, as it is numbered in the group."""
        return [self.ranks.index(ranks[0]) for ranks in self.nodes.values()]

    @property
    def me(self) -> int:
        """This rank's number in the group."""
        return self.ranks.index(self.rank)

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.until - time.monotonic())


@dataclass(frozen=True)
class Phase:
    """A step. seconds: at most. together: whether all ranks must be in it, so that the loss of one ends it."""

    name: str
    work: Callable[[Patient], Any]
    seconds: float
    together: bool = False


def phases(store: dist.Store) -> tuple[Phase, ...]:
    """All, in order. Writing and seeing are steps of their own: all have closed their files before any looks."""
    return (
        Phase("facts", lambda one: facts.facts(one.local_rank, os.environ.get("MASTER_ADDR", "")), 60),
        Phase("disks", _disks, 60),
        Phase("writing", lambda one: _write(one, "first"), 20),
        Phase("seeing", lambda one: _read(one, "first"), 30),
        Phase("rewriting", lambda one: _write(one, "second"), 20),
        Phase("seeing again", lambda one: _read(one, "second"), 30),
        Phase("graphics", lambda one: graphics.graphics(one.local_rank, one.seconds), 90),
        Phase("group", lambda one: _join(one, store), 60, together=True),
        Phase("clocks", lambda one: clocks.clocks(one.me, one.leaders), 30, together=True),
        Phase("collectives", _collectives, 120, together=True),
        Phase("pairs", _pairs, 180, together=True),
        Phase("clearing", clear, 20),
    )


def examine(one: Patient, board: Board, store: dist.Store, coming: float) -> None:
    """Goes through all steps; on rank 0 `one.said` and `one.troubles` are filled.

    coming: seconds that rank 0 waits for ranks to come. Raises TimeoutError where rank 0 is lost.
    """
    _meet(one, board, coming)
    whole = True
    for phase in phases(store):
        if phase.together and (not whole or one.size == 1):
            continue
        if one.rank == 0:
            print(f"loomtune doctor: {phase.name}", file=sys.stderr, flush=True)
        bound = max(LEAST, min(phase.seconds, one.left()))
        until = time.monotonic() + bound + SLACK
        board.post(phase.name, within(bound, partial(phase.work, one)))
        if one.rank == 0:
            wrong = _heard(one, phase.name, board.gather(phase.name, one.ranks_left, until - time.monotonic()))
            board.post(f"after {phase.name}", whole and not (phase.together and wrong))
        whole = board.hear(f"after {phase.name}", 0, until + 2 * SLACK - time.monotonic())


def _meet(one: Patient, board: Board, coming: float) -> None:
    """Rank 0 learns who is there, and tells the nodes to all."""
    board.post("came", [os.uname().nodename, os.environ.get("GROUP_RANK", "")])
    if one.rank == 0:
        came = board.gather("came", range(one.size), coming)
        if absent := [rank for rank in range(one.size) if rank not in came]:
            one.troubles.append({"phase": "coming", "ranks": absent, "error": f"not there after {coming:.0f} s"})
        board.post("nodes", {"nodes": named(came), "word": os.urandom(8).hex()})
    heard = board.hear("nodes", 0, coming + 30)
    one.nodes, one.word = heard["nodes"], heard["word"]
    if one.rank not in one.ranks:
        raise TimeoutError(f"rank {one.rank} came too late: the examination had begun without it")


def named(came: dict[int, Any]) -> dict[str, list[int]]:
    """Nodes by host name; with their number where two have one name."""
    nodes: dict[tuple[str, str], list[int]] = {}
    for rank, (host, group) in sorted(came.items()):
        nodes.setdefault((host, group), []).append(rank)
    hosts = [host for host, _ in nodes]
    return {host if hosts.count(host) == 1 else f"{host}#{group}": ranks for (host, group), ranks in nodes.items()}


def _heard(one: Patient, phase: str, answers: dict[int, Any]) -> bool:
    """Writes down what rank 0 was told; ranks with one trouble stand together. True where there is any.

    Who said nothing is not waited for again.
    """
    one.said[phase] = {rank: of["value"] for rank, of in answers.items() if of.get("value") is not None}
    wrong: dict[str, list[int]] = {}
    for rank in one.ranks_left:
        answer = answers.get(rank, {"late": SILENT})
        if error := answer.get("error") or answer.get("late"):
            wrong.setdefault(error, []).append(rank)
    one.troubles += [{"phase": phase, "ranks": ranks, "error": error} for error, ranks in wrong.items()]
    one.silent |= set(wrong.get(SILENT, ()))
    return bool(wrong)


def _disks(one: Patient) -> Any:
    most = (64 << 20) if one.quick else (4 << 30)
    return disks.disks(one.folder, one.seconds, most) if one.first else None


def _write(one: Patient, word: str) -> None:
    seeing.write(one.folder / "seen", one.rank, f"{one.word} {word}")


def _read(one: Patient, word: str) -> Any:
    seconds = 3.0 if one.quick else 10.0
    found = seeing.read(one.folder / "seen", set(one.ranks) - one.hidden, f"{one.word} {word}", seconds)
    one.hidden |= set(found["unseen"])
    return found


def clear(one: Patient) -> None:
    """Takes away what this rank left for others to see."""
    path = one.folder / "seen"
    with suppress(OSError):  # the folder is the last one's work
        (path / str(one.rank)).unlink(missing_ok=True)
        path.rmdir()


def _join(one: Patient, store: dist.Store) -> None:
    """Forms the group of those that came. Its store is a connection of its own: a wait in it blocks nobody else's."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    ours = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=ours, rank=one.me, world_size=len(one.ranks), timeout=timedelta(seconds=50))
    dist.all_reduce(torch.zeros(1))


def _collectives(one: Patient) -> Any:
    if torch.cuda.is_available():
        torch.cuda.set_device(one.local_rank)  # of this thread
    found = collectives.collectives(one.seconds, one.quick)
    return found if one.rank == 0 else None


def _pairs(one: Patient) -> Any:
    if len(one.nodes) < 2 or one.me not in one.leaders:
        return None
    return pairs.pairs(one.me, one.leaders, min(one.seconds, 60 / len(one.nodes)))
