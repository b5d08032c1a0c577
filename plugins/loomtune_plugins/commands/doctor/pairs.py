"""How fast any two nodes talk: all pairs, in rounds in which no node has two partners."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

LEAST, MOST = 64 << 10, 64 << 20
"""Bytes of a message whose bandwidth is measured."""

PINGS = 50


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Every pair once, no node twice in a round: one keeps its seat, the others go round the table (circle method)."""
    seats = [*range(nodes), *([-1] if nodes % 2 else [])]  # whoever sits opposite to -1 rests
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in facing if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def pairs(me: int, leaders: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Latency and bandwidth with each other node, as the lower of the two measured it. A pair waits for no other.

    Twice, of which the better counts: what was busy for a moment is not slow.
    """
    found: dict[int, dict[str, Any]] = {}
    for pairing in rounds(len(leaders)) * 2:
        for one, other in pairing:
            if me == leaders[one]:
                now = {"nodes": [one, other], **_measure(leaders[other], seconds / 2)}
                found[other] = _better(found.get(other, now), now)
            elif me == leaders[other]:
                _serve(leaders[one])
    return list(found.values())


def _better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    latency, bandwidth = min(one["latency"], other["latency"]), max(one["bandwidth"], other["bandwidth"])
    return {**other, "latency": latency, "bandwidth": bandwidth}


def _measure(other: int, seconds: float) -> dict[str, float]:
    """latency: seconds one way, half of the quickest ping. bandwidth: bytes a second of the largest message.

    Sizes grow until one takes a quarter of the time, so that slow links are measured in the same time as quick ones,
    and beyond what buffers on the way take in at once.
    """
    _exchange(other, 4)  # it may still be busy with another
    latency = min(_exchange(other, 4) for _ in range(PINGS)) / 2
    size, began = LEAST, time.perf_counter()
    while (took := _exchange(other, size)) < seconds / 4 and size < MOST:
        size = min(MOST, size * 4)
    while time.perf_counter() - began < seconds / 2:
        took = min(took, _exchange(other, size))
    _tell(other, 0)
    return {"latency": latency, "bandwidth": size / max(took - latency, 1e-9), "bytes": size}


def _exchange(other: int, size: int) -> float:
    """Seconds until so many bytes were sent and their arrival was told."""
    message, done = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    _tell(other, size)
    began = time.perf_counter()
    dist.send(message, other)
    dist.recv(done, other)
    return time.perf_counter() - began


def _tell(other: int, size: int) -> None:
    dist.send(torch.tensor([size], dtype=torch.int64), other)


def _serve(other: int) -> None:
    """Takes what the other sends until it sends no more."""
    size, done = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8)
    while True:
        dist.recv(size, other)
        if not int(size):
            return
        dist.recv(torch.zeros(int(size), dtype=torch.uint8), other)
        dist.send(done, other)
