"""This machine: torchrun in a child, followed to its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from loomtune.contracts import JobSpec, JobStatus, Launcher, Submission
from loomtune.errors import UserError
from loomtune_launchers import jobs, starter, torchrun
from loomtune_launchers.settings import LocalSettings
from loomtune_launchers.watching import failures, orphans, ranklogs
from loomtune_launchers.watching.pipes import Pipes

_CURE = (
    "start `torchrun --nnodes ... -m loomtune.train` on each node by hand, or choose launcher=ssh or launcher=slurm; "
    "`loomtune plan` needs neither"
)

SLACK = 5
"""Seconds beyond the grace in which torchrun may clear away what it had to kill."""


class Local(Launcher):
    """Runs in the foreground; nothing outlives it."""

    def __init__(self, settings: LocalSettings) -> None:
        self.settings = settings
        jobs.processes_a_node(settings, 1)
        jobs.check_counts(settings)
        jobs.number("nodes", settings.nodes, 1)

    def processes(self, many: bool) -> int:
        here = jobs.processes_a_node(self.settings, (_gpus() or min(2, os.cpu_count() or 1)) if many else 1)
        return self.settings.nodes * here

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings = self.settings
        if settings.nodes > 1:
            what = f"launcher.nodes={settings.nodes}, but launcher=local starts processes on this machine alone"
            raise UserError.of(what, _CURE)
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
        (spec.run / jobs.CANCELLED).unlink(missing_ok=True)
        environment = torchrun.environment(spec)
        if alone := "loomtune_launchers.agent" not in command:
            environment[orphans.PARENT] = str(os.getpid())
        with _logged(spec.run) if alone else _spoken() as (streams, listen):
            child = subprocess.Popen(command, env=environment, preexec_fn=partial(_bound, os.getpid()), **streams)  # noqa: PLW1509
            listen()  # only now: a child must not be forked beside threads
            jobs.note(spec.run, "local", **starter.known(child.pid))
            asked = _follow(child, spec.grace)
        _conclude(spec.run, child, asked)
        return str(child.pid)

    def status(self, run: Path) -> JobStatus:
        ended = jobs.ended(run)
        if ended and not (run / jobs.RECORD).is_file():
            return ended
        said = jobs.noted(run, "local")
        if starter.lives(said):
            return JobStatus("running", starter.where(said))
        return starter.left(run, said, "failed" if starter.here(said) else "unknown")

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        said = jobs.noted(run, "local")
        return ranklogs.merged(run, follow, lambda: not starter.lives(said))

    def cancel(self, run: Path) -> None:
        said = jobs.noted(run, "local")
        if not starter.here(said):
            raise UserError.of(f"{run} was started on {said['host']}", "cancel it there")
        (run / jobs.CANCELLED).touch()
        for number in (signal.SIGTERM, signal.SIGKILL):  # the ranks of a killed torchrun end with it
            if starter.lives(said):
                os.kill(said["pid"], number)
                _await_end(said, self.settings.grace + SLACK)


Streams = tuple[dict[str, Any], Callable[[], None]]
"""Where a child writes to, and what begins to read it."""


@contextmanager
def _spoken() -> Iterator[Streams]:
    """The child speaks for itself: an agent keeps what its ranks say."""
    yield {}, lambda: None


@contextmanager
def _logged(run: Path) -> Iterator[Streams]:
    """What a single process says is kept as that of several, but on a terminal: there it draws."""
    if sys.stdout.isatty() or sys.stderr.isatty():
        yield {}, lambda: None
        return
    here = Path(tempfile.mkdtemp(prefix="loomtune-"))
    pipes = Pipes(here)
    out, err = pipes.rank(0, ranklogs.begin(run, ranklogs.named_by_time()) / "0" / ranklogs.FILE, echo=True)
    with Path(out).open("wb", buffering=0) as stdout, Path(err).open("wb", buffering=0) as stderr:
        shutil.rmtree(here, ignore_errors=True)  # open pipes need no names
        try:
            yield {"stdout": stdout, "stderr": stderr}, pipes.start
        finally:
            pipes.finish()


def _follow(child: subprocess.Popen[bytes], grace: int) -> bool:
    """Waits for the child; gives whether it was asked to leave.

    A signal to us is handed on; torchrun hands it to the ranks, which save and leave. A child that is still there after
    the grace is killed, and its ranks end with it.
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
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    finally:
        with suppress(ProcessLookupError, PermissionError):  # what it started in its group, while the number is its own
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        hard.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    return hard.ident is not None


def _conclude(run: Path, child: subprocess.Popen[bytes], asked: bool) -> None:
    """Sees to it that there is a result, also where the child was killed, or asked to leave before it could listen.

    Whoever ended with exit code 1 has said why, and may have left the result to a newer attempt.
    """
    said, code = jobs.noted(run, "local"), child.returncode
    asked = asked or (run / jobs.CANCELLED).exists()
    if said["pid"] != child.pid or (code == 1 and not asked):
        return
    error = f"{starter.where(said)} {failures.how(code)}"
    if code == UserError.exit_code:
        error = f"{UserError.__name__}: {error}"
    elif asked:
        error = ""
    failures.missing(run, error or None)


def _bound(parent: int) -> None:
    """In the child, before it becomes torchrun: it ends when we end, however that happens."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C comes to us alone; we hand it on once
    orphans.die_with_parent()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _gpus() -> int:
    """NVIDIA GPUs that this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return found if visible is None else min(found, len([name for name in visible.split(",") if name.strip()]))


def _await_end(said: dict[str, Any], seconds: float) -> None:
    until = time.monotonic() + seconds
    while starter.lives(said) and time.monotonic() < until:
        time.sleep(0.1)
