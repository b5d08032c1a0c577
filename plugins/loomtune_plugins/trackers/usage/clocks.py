"""What tells the time of phases: the host's thread, and the accelerator's stream."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_DELAYS = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True, slots=True)
class Moment:
    """wall: seconds by a steady clock. slept: those of them in which this thread neither computed nor wanted a core."""

    wall: float
    slept: float


class HostClock:
    """Of the thread that made it. A mark costs 5 microseconds.

    Sleep is what is left of the time without that on a core and that in the queue for one, which the kernel counts. On
    a CPU a rank computes in the thread that waits for collectives (gloo's own threads send and add up), so in a forward
    or backward pass it sleeps for others alone, but for the little that it waits for its own pool of threads. Nothing
    is wrapped, so it is true of DDP's and DeepSpeed's C++ too. A kernel without the file has the queue in it.
    """

    def __init__(self) -> None:
        self._delays = _DELAYS.open("rb", buffering=0) if _DELAYS.exists() else None

    def __call__(self) -> Moment:
        wall = time.perf_counter()
        return Moment(wall, wall - time.thread_time() - self._queued())

    def _queued(self) -> float:
        return int(os.pread(self._delays.fileno(), 64, 0).split()[1]) * 1e-9 if self._delays else 0.0


def wall(begin: Moment, end: Moment) -> float:
    """Seconds that passed."""
    return end.wall - begin.wall


def slept(begin: Moment, end: Moment) -> float:
    """Seconds that the thread slept."""
    return max(0.0, end.slept - begin.slept)


def event() -> torch.cuda.Event:
    """A mark in the accelerator's stream, which nobody waits for.

    The host ends a step when it has read the norm and handed out the update, and hears of that one's end in the next
    step: so what is not known yet at a step's end counts with the next, by this clock as in the step's seconds.
    """
    mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    mark.record()
    return mark


def computed(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Seconds between two marks, both of which were reached."""
    return float(begin.elapsed_time(end)) / 1000


def reached(mark: torch.cuda.Event) -> bool:
    """Whether the accelerator has come to a mark."""
    return bool(mark.query())  # type: ignore[no-untyped-call]
