"""Hosts that ssh reaches: an agent on each, all followed to the end from here."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loomtune.contracts import JobSpec, JobStatus, Launcher, Submission
from loomtune.errors import LeaseLost, Preempted, RunFailed, UserError
from loomtune_launchers import jobs, starter
from loomtune_launchers.asked import Asked, say
from loomtune_launchers.ssh.group import Group, endpoint
from loomtune_launchers.ssh.hosts import chosen, parse, slots
from loomtune_launchers.ssh.remote import LAST, SLACK
from loomtune_launchers.ssh.settings import SshSettings
from loomtune_launchers.watching import ranklogs

LEAST_PATIENCE = 2


class Ssh(Launcher):
    """Runs in the foreground; nothing outlives it, here or there."""

    def __init__(self, settings: SshSettings) -> None:
        self.settings = settings
        jobs.processes_a_node(settings, 1)
        jobs.check_counts(settings)
        jobs.number("requeues", settings.requeues)
        for host in settings.hosts:
            parse(host)
        if settings.patience < LEAST_PATIENCE:
            said = f"launcher.patience={settings.patience} is shorter than a connection may pause"
            raise UserError.of(said, f"set at least {LEAST_PATIENCE} seconds; 30 is usual")
        if not 0 <= settings.port < 2**16:
            raise UserError.of(f"launcher.port={settings.port} is no port", "set 0 for a free one, or 1 to 65535")

    def processes(self, many: bool) -> int:
        hosts = chosen(self.settings)
        given = 0 if self.settings.procs != "auto" else slots(hosts) if many else 1
        if self.settings.procs == "auto" and not given:
            said = "how many processes a host is to run is not known from here"
            raise UserError.of(said, "set launcher.procs=8, say: one for each GPU, or write slots=8 in the hostfile")
        return len(hosts) * jobs.processes_a_node(self.settings, given)

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings, hosts = self.settings, chosen(self.settings)
        return JobSpec(
            run=run,
            arguments=(str(run),),
            nodes=(len(hosts), len(hosts)),
            procs=max(1, processes // len(hosts)),
            environment=jobs.threads(settings, processes // len(hosts), None),
            grace=settings.grace,
            restarts=settings.restarts,
            requeues=settings.requeues,
        )

    def render(self, spec: JobSpec) -> Submission:
        order = self._order(spec, "ATTEMPT")
        go = {"endpoint": endpoint(order["address"], order["port"] or "FREE-PORT"), "attempt": "ATTEMPT"}
        return Submission(
            commands=tuple(self._command(host.options) for host in chosen(self.settings)),
            files={jobs.FILE: jobs.text(spec)},
            input=f"{json.dumps(order)}\ngo {json.dumps(go)}\n",
        )

    def submit(self, spec: JobSpec) -> str:
        forbidden = spec.run / jobs.CANCELLED
        forbidden.unlink(missing_ok=True)
        with Asked(forbidden.exists) as asked:
            for left in range(spec.requeues, -1, -1):
                group, attempt = self._attempt(spec, asked)
                if not left or asked.times or _settled(spec.run) != "preempted":
                    break
                say(f"the run was asked to leave, but not from here; it starts again, {left} more times at most")
                (spec.run / "result.json").unlink()
            if _attempt(spec.run) != attempt:  # what the folder says now is not of this start
                raise LeaseLost(f"a later start has taken {spec.run} over")
            if asked.times and not _settled(spec.run):
                raise Preempted("it was asked to leave before its ranks had anything to say; start it again")
        if group.cause:
            _tell(spec.run, group)
        return attempt

    def status(self, run: Path) -> JobStatus:
        ended = jobs.ended(run)
        if ended and not (run / jobs.RECORD).is_file():
            return ended
        said = jobs.noted(run, "ssh")
        if _lives(said):
            return JobStatus("running", starter.where(said))
        return starter.left(run, said, said["over"] or ("failed" if starter.here(said) else "unknown"))

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        return ranklogs.merged(run, follow, lambda: self.status(run).state not in ("running", "unknown"))

    def cancel(self, run: Path) -> None:
        said = jobs.noted(run, "ssh")
        (run / jobs.CANCELLED).touch()  # the launcher looks for it too, so that a run can be ended from any host
        here = starter.here(said)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _lives(said):
                os.kill(said["pid"], number)
            if _over(run, here, self.settings.grace + 2 * SLACK + LAST):
                return
        raise RunFailed(f"the launcher, {starter.where(said)}, has not ended; end it there")

    def _command(self, host: tuple[str, ...]) -> tuple[str, ...]:
        """What runs here for a host; ssh takes the first of several values of an option, so the user's go before."""
        settings, python = self.settings, self.settings.python or sys.executable
        patient = (f"ConnectTimeout={settings.patience}", f"ServerAliveInterval={max(1, settings.patience // 3)}")
        ours = [part for option in patient for part in ("-o", option)]
        there = f"exec {shlex.quote(python)} -m loomtune_launchers.ssh.remote"
        return ("ssh", "-T", "-o", "BatchMode=yes", *settings.options, *ours, *host, there)

    def _order(self, spec: JobSpec, attempt: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "attempt": attempt,
            "run": str(spec.run),
            "folder": settings.folder or str(Path.cwd()),
            "address": settings.address or chosen(settings)[0].name,
            "port": settings.port,
            "patience": settings.patience,
            "job": json.loads(jobs.text(spec)),
        }

    def _attempt(self, spec: JobSpec, asked: Asked) -> tuple[Group, str]:
        """One start of all hosts, followed to their end."""
        run, hosts, submission = spec.run, chosen(self.settings), self.render(spec)
        attempt = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        record = {"attempt": attempt, "hosts": [host.written for host in hosts], **starter.known()}
        jobs.note(run, "ssh", **record, over="")
        for name, text in submission.files.items():
            (run / name).write_text(text)
        order = self._order(spec, attempt)
        group = Group(self.settings.patience, asked, lambda: _settled(run) not in ("", "failed"))
        try:
            group.start(hosts, submission.commands, json.dumps(order))
            if group.meet(submission.commands, order):
                group.follow(spec.grace)
        finally:
            group.close()
            if _attempt(run) == attempt:  # else a later start has taken the run over
                jobs.note(run, "ssh", **record, over="preempted" if asked.times else "failed")
        return group, attempt


def _lives(said: dict[str, Any]) -> bool:
    return not said["over"] and starter.lives(said)


def _over(run: Path, here: bool, seconds: float) -> bool:
    """Whether the launcher ends within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        said = jobs.noted(run, "ssh")
        if said["over"] or (here and not _lives(said)):
            return True
        time.sleep(0.1)
    return False


def _attempt(run: Path) -> str:
    """The attempt that the run's folder speaks of."""
    with suppress(UserError):
        return str(jobs.noted(run, "ssh")["attempt"])
    return ""


def _settled(run: Path) -> str:
    """How the run says that it ended; empty where it has not."""
    said = jobs.ended(run)
    return said.state if said else ""


def _tell(run: Path, group: Group) -> None:
    """Names the host that ended first. Raises RunFailed where nothing else says how the run ended."""
    if not _settled(run):
        raise RunFailed("\n    ".join([group.cause, *group.tail]))
    say(group.cause)
