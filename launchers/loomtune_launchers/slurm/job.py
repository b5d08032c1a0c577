"""What the batch script becomes: it starts the nodes, hears of the time limit, and decides what follows the run's end.

`python -m loomtune_launchers.slurm.job RUN`, or `--item-of TABLE` in an array, where the table lists the runs' folders.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loomtune.errors import Preempted, UserError
from loomtune_launchers import jobs
from loomtune_launchers.jobs import CANCELLED
from loomtune_launchers.slurm.queue import NO_ANSWER, Job

NODE_COMMAND = "slurm.json"
"""In the run's folder: what starts the nodes, as a list, so that no value passes through the batch script's shell."""

STOP = "stop"
"""In the run's folder: ranks are asked to save and leave. Whoever hears it takes it away."""

PORTS = (15000, 15000)
"""Rendezvous ports, as (first, how many): below those that Linux hands out. Jobs begin to look at different ones."""

PATIENCE = 60.0
"""Seconds in which the nodes of a job must answer, or one of them counts as lost."""

SHOWN = 60
"""Seconds until a shared folder shows, by NFS's defaults at the latest, what another node has written."""

OVER = ("completed", "stopped")
"""Results that nothing follows."""

GONE = 300.0
"""Seconds in which a controller that is away is expected back, and Slurm to end this process after a requeue."""


def main(arguments: list[str]) -> int:
    """Serves the run of this job; gives the job's exit code."""
    if arguments[0] == "--item-of":
        table = json.loads(Path(arguments[1]).read_text())
        return Batch(Path(table[int(os.environ["SLURM_ARRAY_TASK_ID"])]), os.environ).serve()
    return Batch(Path(arguments[0]), os.environ).serve()


class Batch:
    """One start of a job. said: what Slurm says of it, as variables."""

    def __init__(self, run: Path, said: Mapping[str, str]) -> None:
        self.run = run
        self.said = said
        self.spec = jobs.read((run / jobs.FILE).read_text())
        item = said.get("SLURM_ARRAY_TASK_ID")  # an array bears the number of one of its items
        self.job = Job(f"{said['SLURM_ARRAY_JOB_ID']}_{item}" if item else said["SLURM_JOB_ID"])
        self.starts = int(said.get("SLURM_RESTART_COUNT") or 0)

    def serve(self) -> int:
        """Runs the nodes to their end, and decides what that means."""
        if (self.run / CANCELLED).exists():
            return _told("the run was cancelled", 1)
        if not self._ours():
            return _told("the run has been started in another way since this job was submitted", 1)
        if self.starts and self._result().get("status") in OVER:  # a node was lost when all was done
            return self.after(0)
        for name in ("result.json", STOP):  # of an earlier start; this one's are to be told from them
            (self.run / name).unlink(missing_ok=True)
        if self.starts >= self.spec.requeues:
            self.job.stay_ended()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._leave)
        code = subprocess.run([*self.command(), *self.meeting()], check=False).returncode
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return self.after(code)

    def command(self) -> list[str]:
        """What starts the nodes, but for where they meet."""
        found: list[str] = json.loads((self.run / NODE_COMMAND).read_text())
        return found

    def meeting(self) -> list[str]:
        """Endpoint, name of the attempt, and how many nodes came: of this start alone, and the same on all nodes."""
        expand = ["scontrol", "show", "hostnames", self.said["SLURM_JOB_NODELIST"]]
        head = subprocess.run(expand, check=True, capture_output=True, text=True).stdout.split()[0]
        port = _free(int(self.said["SLURM_JOB_ID"]))  # Slurm runs the batch script on the first node
        return [f"{head}:{port}", f"{self.job.number}-{self.starts}", self.said["SLURM_JOB_NUM_NODES"]]

    def _ours(self) -> bool:
        """Whether the run is still this job's. sbatch may return, and the record be written, after the job began."""
        path = self.run / jobs.RECORD
        for _ in range(SHOWN):
            said = json.loads(path.read_text()) if path.is_file() else {}
            if not said or (said["launcher"], said.get("job")) == ("slurm", self.job.number):
                return True
            time.sleep(1)
        return False

    def after(self, code: int) -> int:
        """Queues the job again where that is called for. Gives its exit code. code: srun's."""
        result = self._result(SHOWN if code == 0 else 0)
        if result.get("status") in OVER:
            return int(result["error"] is not None)
        asked = result.get("status") == "preempted" or code == Preempted.exit_code
        code = Preempted.exit_code if asked else code or 1
        if code == UserError.exit_code or (self.run / CANCELLED).exists() or self._state() != "RUNNING":
            return code  # a job that is ending already has been decided about: by Slurm, or by who cancelled it
        why = "the run was asked to leave" if asked else self._innocent()
        if not why:
            return code
        if self.starts >= self.spec.requeues:
            return _told(f"{why}, and launcher.requeues={self.spec.requeues} is used up", code)
        if not self.job.requeue():
            return _told(f"{why}, and Slurm refuses to queue the job again", code)
        _told(f"{why}; the job is queued again, {self.starts + 1} of {self.spec.requeues} times", code)
        time.sleep(GONE)
        return code

    def _state(self) -> str:
        """Slurm's word for this job; a controller that is away for a moment is waited for."""
        until = time.monotonic() + GONE
        while (state := self.job.state()[0]) == NO_ANSWER and time.monotonic() < until:
            time.sleep(10)
        return state

    def _innocent(self) -> str:
        """What ended a run that did not end by itself; empty where nothing is known that did."""
        if self.job.preempted():
            return "the job was preempted"
        return "" if self._answer() else "a node was lost"

    def _answer(self) -> bool:
        """Whether every node of the job still starts something."""
        try:
            asked = subprocess.run(
                ["srun", "--overlap", "--ntasks-per-node=1", "true"], check=False, timeout=PATIENCE, capture_output=True
            )
        except subprocess.TimeoutExpired:
            return False
        return asked.returncode == 0

    def _leave(self, number: int, frame: object) -> None:
        """Asks the ranks to save and leave."""
        _told(f"heard {signal.Signals(number).name}; the run is asked to save and leave", 0)
        (self.run / STOP).touch()

    def _result(self, patience: int = 0) -> dict[str, Any]:
        """What the run has left. patience: seconds that another node's file may take to be seen here."""
        path = self.run / "result.json"
        for _ in range(patience):
            if path.is_file():
                break
            time.sleep(1)
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found


def _free(job: int) -> int:
    """A port of this node that nothing listens on: the one of the job's number, or one further on."""
    first, count = PORTS
    for further in range(count):
        port = first + (job + further) % count
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what only waits to be forgotten is free
            with suppress(OSError):
                one.bind(("", port))
                return port
    raise RuntimeError(f"every port from {first} to {first + count - 1} is taken")


def _told(what: str, code: int) -> int:
    print(f"loomtune: {what}", file=sys.stderr, flush=True)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
