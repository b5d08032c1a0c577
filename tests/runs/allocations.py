"""What torch's CPU allocator gave out and took back, moment by moment.

Nothing here looks at tensors, as planning does: `allocations.cpp` stands before c10's allocator and keeps a record of
every request, whatever code and thread it comes from. torch.profiler has such records too, with the operations that
asked, but none of what a thread frees that it does not follow: what gloo sends is often let go last by gloo's own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from loomtune.phases import Phases

SOURCE = Path(__file__).with_suffix(".cpp")
BETWEEN = "between"
"""Phases: the moment after one has ended and before the next begins."""

Where = tuple[str, ...]
"""Operations that memory was asked in, the innermost last."""


@dataclass(frozen=True, slots=True)
class Event:
    """Of the allocator. at: nanoseconds since the epoch. bytes: less than 0 where they are taken back."""

    at: int
    address: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """Memory that is out, and the moment and time in which it was asked for."""

    bytes: int
    moment: str
    at: int
    address: int


@dataclass(slots=True)
class Records:
    """Of one process, from the start of the recording to its end.

    peaks: the most bytes that were out in each moment. held: what was out when the most bytes of all were; left: at the
    end. where: of blocks, by address and time, the operations, if a profiler was there to see them.
    """

    peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    held: Sequence[Block] = ()
    left: Sequence[Block] = ()
    where: Mapping[int, Sequence[tuple[int, Where]]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most bytes of all moments."""
        return max(self.peaks.values())

    def explained(self, blocks: Sequence[Block], depth: int = 4) -> list[tuple[int, int, str]]:
        """(bytes, blocks, in what) of these, the most first."""
        found: dict[str, list[int]] = defaultdict(list)
        for block in blocks:
            seen = self.where.get(block.address, ())
            _, where = min(seen, key=lambda one: abs(one[0] - block.at), default=(0, ()))
            found[" > ".join([block.moment, *where[-depth:]])].append(block.bytes)
        return sorted(((sum(sizes), len(sizes), what) for what, sizes in found.items()), reverse=True)


class Recorder:
    """Records while its context lasts; `phases` say in which moment. profiled: with operations, which costs time."""

    def __init__(self, phases: Phases | None = None, *, profiled: bool = False) -> None:
        self.records = Records()
        self.profiled = profiled
        self._stack: list[str] = []
        self._marks: list[tuple[int, str]] = []
        if phases:
            phases.listeners.append(self._hear)

    @contextmanager
    def __call__(self) -> Iterator[Records]:
        """Within it all is recorded; what it gives is filled when it ends."""
        counting, kineto = _counting(), profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with kineto if self.profiled else nullcontext():
            counting.start()
            yield self.records
            count = counting.stop()
        said = counting.recorded()
        fill(self.records, [Event(*said[3 * i : 3 * i + 3]) for i in range(count)], self._marks)
        if self.profiled:
            self.records.where = asked(kineto.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """What is done within it, beside the phases of steps."""
        self._hear(name, True)
        try:
            yield
        finally:
            self._hear(name, False)

    def _hear(self, name: str, begins: bool) -> None:
        if begins:
            self._stack.append(name)
        else:
            self._stack.pop()
        self._marks.append((time.time_ns(), self._stack[-1] if self._stack else BETWEEN))


def fill(records: Records, events: Sequence[Event], marks: Sequence[tuple[int, str]]) -> None:
    """Adds events up. marks: when another moment began."""
    totals = [total for total, _, _ in _running(events, marks)]
    highest = totals.index(max(totals))
    for number, (total, moment, out) in enumerate(_running(events, marks)):
        records.peaks[moment] = max(records.peaks[moment], total)
        if number == highest:
            records.held = list(out.values())
    records.left = list(out.values())


def _running(events: Sequence[Event], marks: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str, dict[int, Block]]]:
    """Bytes that are out, the moment, and the blocks by address: after each event and at the start of each moment."""
    out, total, moment, left = dict[int, Block](), 0, BETWEEN, list(marks)[::-1]
    for event in events:
        while left and left[-1][0] <= event.at:
            moment = left.pop()[1]
            yield total, moment, out
        total += event.bytes
        if event.bytes > 0:
            out[event.address] = Block(event.bytes, moment, event.at, event.address)
        else:
            del out[event.address]
        yield total, moment, out


def asked(tree: Sequence[Any]) -> dict[int, list[tuple[int, Where]]]:
    """By address, when the profiler saw memory given out there, and within which operations."""
    found: dict[int, list[tuple[int, Where]]] = defaultdict(list)
    left: list[tuple[Any, Where]] = [(event, ()) for event in tree]
    while left:
        event, where = left.pop()
        if event.tag == _EventType.Allocation and event.extra_fields.alloc_size > 0:
            found[event.extra_fields.ptr].append((event.start_time_ns, where))
        left += [(child, (*where, event.name)) for child in event.children]
    return found


@cache
def _counting() -> Any:
    """The library of `allocations.cpp`."""
    counting = ctypes.CDLL(str(built()))
    counting.stop.restype = ctypes.c_int64
    counting.recorded.restype = ctypes.POINTER(ctypes.c_int64)
    return counting


def built() -> Path:
    """Compiles it, once for each torch and text of it. Raises CalledProcessError where that fails."""
    torch_folder = Path(torch.__file__).parent
    mark = sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"loomtune-allocations-{os.getuid()}-{mark}.so"
    if not path.is_file():
        fresh = path.with_suffix(f".{os.getpid()}")
        options = ["-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}"]
        links = [f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(fresh)]
        subprocess.run([os.environ.get("CXX", "c++"), *options, str(SOURCE), *links], check=True)
        fresh.replace(path)
    return path
