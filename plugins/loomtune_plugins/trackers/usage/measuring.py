"""The numbers that a step gets beside its loss."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from loomtune_plugins.planner.flops import utilisation
from loomtune_plugins.trackers.usage.clocks import HostClock, computed, event, reached, slept, wall
from loomtune_plugins.trackers.usage.peak import peak
from loomtune_plugins.trackers.usage.timeline import OTHER, Timeline, sums
from loomtune_plugins.trackers.usage.worth import CONVENTIONS, Amount, Passes, operations, passes

if TYPE_CHECKING:
    from loomtune.run import Run

EXPOSED = "exposed_communication_seconds"
WAITS = ("forward", "backward", "optimizer", OTHER)
"""Where a rank that sleeps waits for others. While it makes batches or writes a checkpoint it may wait for a disk."""


class Measuring:
    """Hands the step's times, operations and memory to the step's metrics as its optimizer phase ends.

    On an accelerator time is that of its stream, by events that are read when they are known and waited for by nobody.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.host = Timeline(HostClock())
        self.device = Timeline(event) if run.world.device.type == "cuda" else None
        self.memory = Memory(run.world.device) if self.device else None
        self.peak: float | None = None
        self.passes: list[Passes] = []
        self.broken = False
        self._learn()

    def _learn(self) -> None:
        """What the device can do and what a step asks of it, both for good. A model may be unlike all that is known."""
        try:
            self.peak = peak(self.run)
            self.passes = passes(self.run) if self.peak else []
        except Exception as error:
            self.run.tell_once(f"MFU is not measured: {type(error).__name__}: {error}")

    def __call__(self, name: str, begins: bool) -> None:
        """An edge of a phase. What goes wrong is said once, nothing is measured from then on, and the run goes on."""
        if self.broken:
            return
        try:
            self._hear(name, begins)
        except Exception as error:
            self.broken = True
            what = f"loomtune: rank {self.run.world.rank} measures no more: {type(error).__name__}: {error}"
            print(what, file=sys.stderr, flush=True)  # noqa: T201

    def _hear(self, name: str, begins: bool) -> None:
        self.host(name, begins)
        if self.device is not None and self.memory is not None:
            self.device(name, begins)
            self.memory(name, begins)
        if name == "optimizer" and not begins and self.host.began is not None:
            self._end_step()

    def _end_step(self) -> None:
        began, run = self.host.began, self.run
        assert began is not None
        seconds, spans = wall(began, self.host.end()), self.host.take()
        times = sums(spans, wall)
        if self.device is not None and self.memory is not None:
            self.device.end()
            times = sums(self.device.take(reached), computed)
            run.noted |= self.memory.take()
        elif run.world.size > 1:
            waited = sums([span for span in spans if span.phase in WAITS], slept)
            run.noted[EXPOSED] = sum(waited.values())
        run.noted |= {f"seconds/{phase}": time for phase, time in times.items()}
        self._note_work(seconds)

    def _note_work(self, seconds: float) -> None:
        run, amount = self.run, Amount.of(self.run.samples)
        run.noted["all_tokens_per_second"] = amount.tokens / seconds
        if self.peak and self.passes:
            for name in CONVENTIONS:
                worth = operations(self.passes, amount, name)
                run.noted[name] = utilisation(worth, seconds, run.world.size, self.peak)


class Memory:
    """Peaks of an accelerator's allocator by phase, and the largest so far, which it forgets at each edge."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stack, self._phases = device, list[str](), dict[str, int]()
        self._most = torch.cuda.max_memory_allocated(device)

    def __call__(self, name: str, begins: bool) -> None:
        """An edge of a phase."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)  # flat, they take ten times as long
        peak = int(stats["allocated_bytes"]["all"]["peak"])
        self._most = max(self._most, peak)
        if self._stack:
            self._phases[self._stack[-1]] = max(peak, self._phases.get(self._stack[-1], 0))
        torch.cuda.reset_peak_memory_stats(self._device)
        if begins:
            self._stack.append(name)
        else:
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """Metrics of the step; `memory_bytes` means what it means without a measurement by phase."""
        found = {f"memory_bytes/{phase}": float(peak) for phase, peak in self._phases.items()}
        self._phases = {}
        return {"memory_bytes": float(self._most), **found}
