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
    """Latency and bandwidth with each other node, as the lower of the two measured it. A pair waits for no other."""
    found = []
    for pairing in rounds(len(leaders)):
        for one, other in pairing:
            if me == leaders[one]:
                found.append({"nodes": [one, other], **_measure(leaders[other], seconds)})
            elif me == leaders[other]:
                _serve(leaders[one])
    return found


def _measure(other: int, seconds: float) -> dict[str, float]:
    """latency: seconds one way, half of the quickest ping. bandwidth: bytes a second, the better of the last two sizes.

    Sizes grow until one takes a quarter of the time, so that slow links are measured in the same time as quick ones.
    """
    _exchange(other, 4)  # it may still be busy with another
    latency = min(_exchange(other, 4) for _ in range(PINGS)) / 2
    size, speeds = LEAST, []
    while True:
        took = max(_exchange(other, size) - latency, 1e-9)
        speeds.append(size / took)
        if size >= MOST or took > seconds / 4:
            break
        size = min(MOST, size * 4)
    _tell(other, 0)
    return {"latency": latency, "bandwidth": max(speeds[-2:]), "bytes": size}


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
