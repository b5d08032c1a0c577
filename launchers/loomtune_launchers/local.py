"""This machine: torchrun in a child, followed to its end."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from loomtune.contracts import JobSpec, JobStatus, Launcher, Submission
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.settings import LocalSettings

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG

SLACK = 5
"""Seconds beyond the grace in which torchrun may clear away what it had to kill."""


class Local(Launcher):
    """Runs in the foreground; nothing outlives it."""

    def __init__(self, settings: LocalSettings) -> None:
        self.settings = settings
        jobs.processes_a_node(settings, 1)

    def processes(self, many: bool) -> int:
        return jobs.processes_a_node(self.settings, (_gpus() or min(2, os.cpu_count() or 1)) if many else 1)

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings = self.settings
        return JobSpec(
            run=run,
            arguments=(str(run),),
            procs=processes,
            environment=jobs.threads(settings, processes, os.cpu_count()),
            grace=settings.grace,
            restarts=settings.restarts,
        )

    def render(self, spec: JobSpec) -> Submission:
        return Submission(commands=(torchrun.command(spec),), environment=dict(spec.environment))

    def submit(self, spec: JobSpec) -> str:
        (command,) = self.render(spec).commands
        child = subprocess.Popen(command, env=torchrun.environment(spec), preexec_fn=_die_with_parent)  # noqa: PLW1509
        jobs.note(spec.run, "local", pid=child.pid)
        _follow(child, spec.grace)
        return str(child.pid)

    def status(self, run: Path) -> JobStatus:
        return jobs.ended(run) or JobStatus("running" if _alive(_pid(run)) else "failed", f"process {_pid(run)}")

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        for path in sorted((run / "logs").rglob("*")):
            if path.is_file():
                yield from path.read_text(errors="replace").splitlines()

    def cancel(self, run: Path) -> None:
        pid = _pid(run)
        for number in (signal.SIGTERM, signal.SIGKILL):  # the ranks of a killed torchrun end with it
            if _alive(pid):
                os.kill(pid, number)
                _await_end(pid, self.settings.grace + SLACK)


def _follow(child: subprocess.Popen[bytes], grace: int) -> None:
    """Waits for the child. A signal to us is handed on; torchrun hands it to the ranks, which save and leave.

    A child that is still there after the grace is killed, and its ranks end with it.
    """
    hard = threading.Timer(grace + SLACK, child.kill)
    hard.daemon = True

    def hand_on(number: int, frame: object) -> None:
        print(f"loomtune: stopping; up to {grace} s for a last checkpoint", file=sys.stderr, flush=True)  # noqa: T201
        child.send_signal(signal.SIGTERM)
        if hard.ident is None:
            hard.start()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        child.wait()
    finally:
        hard.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """In the child, before it becomes torchrun: ends it when we end, however that happens."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C comes to us alone; we hand it on once
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _gpus() -> int:
    """NVIDIA GPUs that this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return found if visible is None else min(found, len([name for name in visible.split(",") if name.strip()]))


def _pid(run: Path) -> int:
    path = run / "launcher.json"
    return int(json.loads(path.read_text())["pid"]) if path.is_file() else 0


def _await_end(pid: int, seconds: int) -> None:
    until = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < until:
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return pid > 0
