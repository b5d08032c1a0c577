"""A profiler's trace of some steps on every rank (`profile.steps`), for chrome://tracing or Perfetto."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile, record_function

from loomtune_plugins.trackers.usage.timeline import FIRST

if TYPE_CHECKING:
    from loomtune.run import Run

Interval = tuple[float, float]

COMMUNICATION = ("nccl", "ncclDevKernel", "rccl")
"""How kernels of collectives are called."""


class Tracing:
    """Records steps `first` to `last`, with the phases as ranges, into `RUN/profile/<attempt>/rank-<rank>.json.gz`.

    The file has its name when it is whole. Where the run ends sooner it holds the steps until then. What goes wrong is
    said, and the run goes on.
    """

    def __init__(self, run: Run, first: int, last: int) -> None:
        self.run, self.first, self.last = run, first, last
        self._ranges: list[Any] = []
        self._profile: profile | None = None
        self._begun = 0  # the step with which the recording began
        self._between = True  # two steps
        if run.step >= last or run.steps < first:
            said = f"this attempt goes from step {run.step + 1} to {run.steps}, so nothing is traced"
            run.tell_once(f"profile.steps={run.settings.profile.steps}: {said}")

    def __call__(self, name: str, begins: bool) -> None:
        """An edge of a phase."""
        coming = self.run.step + 1
        if begins and name in FIRST and self._between:
            self._between = False
            if not self._begun and self.first <= coming <= self.last:
                self._start(coming)
        if self._profile is not None:
            self._mark(name, begins)
        self._between |= name == "optimizer" and not begins

    def _start(self, step: int) -> None:
        self._begun = step
        try:
            wanted = [ProfilerActivity.CPU]
            self._profile = profile(activities=[*wanted, ProfilerActivity.CUDA] if self._cuda else wanted)
            self._profile.start()
        except Exception as error:
            self._profile = None
            self._say(error)

    def _mark(self, name: str, begins: bool) -> None:
        if begins:
            self._ranges.append(record_function(f"loomtune {name}"))
            self._ranges[-1].__enter__()
        elif self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    def close(self) -> None:
        """Ends the recording and keeps it."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        try:
            recorded.stop()
            self._keep(recorded)
        except Exception as error:
            self._say(error)

    def _keep(self, recorded: profile) -> None:
        run = self.run
        folder = run.folder / "profile" / run.attempt
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{run.world.rank}.json.gz"
        draft = path.with_name(f"draft-{path.name}")
        recorded.export_chrome_trace(str(draft))
        draft.replace(path)
        run.tell_once(f"a trace of each rank is in {folder}")
        if self._cuda and run.world.size > 1:
            steps = max(1, run.step + 1 - self._begun)
            run.noted["exposed_communication_seconds"] = exposed(*_kernels(recorded)) / steps

    @property
    def _cuda(self) -> bool:
        return self.run.world.device.type == "cuda"

    def _say(self, error: Exception) -> None:
        what = f"loomtune: rank {self.run.world.rank} keeps no trace: {type(error).__name__}: {error}"
        print(what, file=sys.stderr, flush=True)  # noqa: T201


def exposed(communication: Iterable[Interval], computation: Iterable[Interval]) -> float:
    """Length of what the first cover and the second do not."""
    return _covered([*communication, *(work := list(computation))]) - _covered(work)


def _covered(intervals: Iterable[Interval]) -> float:
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _kernels(recorded: profile) -> tuple[list[Interval], list[Interval]]:
    """What a device did, in seconds: collectives, and all other kernels; copies and ranges of hosts are neither."""
    found: tuple[list[Interval], list[Interval]] = ([], [])
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.activity_type() == "kernel":
            begin = event.start_ns() * 1e-9
            collective = event.name().startswith(COMMUNICATION)
            found[0 if collective else 1].append((begin, begin + event.duration_ns() * 1e-9))
    return found
