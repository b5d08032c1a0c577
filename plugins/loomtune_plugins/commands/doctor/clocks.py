"""How far the clocks of nodes are apart: pings between each node's first rank and rank 0, as NTP does it.

Of a ping that leaves at t0, arrives at t1, is answered at t2 and is back at t3 (t1 and t2 by the other's clock), the
offset is ((t1 - t0) + (t2 - t3)) / 2, wrong by at most half of what was spent on the way, (t3 - t0) - (t2 - t1)
(RFC 5905, section 8).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

PINGS = 20

Ping = tuple[int, int, int, int]
"""t0, t1, t2, t3 in nanoseconds."""


def offset(pings: Iterable[Ping]) -> dict[str, float]:
    """Seconds by which the other clock is ahead of ours, and how far off that may be: by the quickest of the pings."""
    t0, t1, t2, t3 = min(pings, key=lambda ping: (ping[3] - ping[0]) - (ping[2] - ping[1]))
    on_the_way = (t3 - t0) - (t2 - t1)
    return {"offset": ((t1 - t0) + (t2 - t3)) / 2e9, "uncertainty": max(0, on_the_way) / 2e9}


def clocks(me: int, leaders: Sequence[int]) -> dict[str, Any] | None:
    """By how much rank 0's clock is ahead of ours, for the leaders of the other nodes. One after another."""
    if me == leaders[0]:
        for other in leaders[1:]:
            _answer(other)
        return None
    return offset([_ask(leaders[0]) for _ in range(PINGS)]) if me in leaders else None


def _ask(other: int) -> Ping:
    times = torch.zeros(2, dtype=torch.int64)
    began = time.time_ns()
    dist.send(times, other)
    dist.recv(times, other)
    return began, int(times[0]), int(times[1]), time.time_ns()


def _answer(other: int) -> None:
    times = torch.zeros(2, dtype=torch.int64)
    for _ in range(PINGS):
        dist.recv(times, other)
        times[0] = time.time_ns()
        times[1] = time.time_ns()
        dist.send(times, other)
