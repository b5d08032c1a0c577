"""What Slurm is asked and told about a job, by its own commands."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from loomtune.errors import UserError

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
NO_ANSWER = "UNKNOWN"

PATIENCE = 120.0
"""Seconds that a command of Slurm may take."""

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Which cluster is meant. The other SLURM_* of a job that we are in would be taken for options of ours."""

TASTES = ("SLURM_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SBATCH_WAIT", "SBATCH_ARRAY_INX")
"""What a user has set for commands typed by hand: a filter hides a job that lives, a question waits for an answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job or an item of an array (`12`, `12_3`), and the cluster that it is on where that is not the default."""

    number: str
    cluster: str = ""

    @classmethod
    def parse(cls, parsable: str) -> Job:
        """Of what `sbatch --parsable` printed."""
        found = re.findall(r"^(\d+)(?:;(\S+))?\s*$", parsable, re.MULTILINE)  # a site's wrapper may say more
        if not found:
            what = f"sbatch did not say which job it made, but {parsable.strip()!r}"
            raise UserError.of(what, "look for it with squeue, and leave out what sbatch makes no job with")
        return cls(*found[-1])

    def item(self, number: int) -> Job:
        """An item of this array."""
        return Job(f"{self.number}_{number}", self.cluster)

    def _on(self) -> list[str]:
        return [f"--clusters={self.cluster}"] if self.cluster else []

    def state(self) -> tuple[str, str]:
        """Slurm's word for it and the reason; ("", "") where it knows no such job, or no longer.

        ("UNKNOWN", why) where the controller does not answer.
        """
        return self._states()[-1]

    def active(self) -> bool:
        """Whether it, or an item of it, waits, runs, or is being ended, or nobody can tell."""
        return any(state in (*WAITING, *RUNNING, NO_ANSWER) for state, _ in self._states())

    def _states(self) -> list[tuple[str, str]]:
        """Of every item where it is an array, and else of one."""
        queue = ["squeue", *self._on(), "--noheader", "--array", "--states=all", f"--jobs={self.number}"]
        asked = _done([*queue, "--format=%T|%r"])
        if asked is None or (asked.returncode and "Invalid job id" not in asked.stderr):
            return [(NO_ANSWER, asked.stderr.strip() if asked else "squeue does not answer")]
        said = _plain(asked.stdout) if not asked.returncode else ""
        if not said:
            records = ["sacct", *self._on(), "--noheader", "--parsable2", "--allocations", f"--jobs={self.number}"]
            said = _asked([*records, "--format=State,Reason"])
        lines = [line.partition("|") for line in said.splitlines() or [""]]
        return [(state.partition(" ")[0], reason) for state, _, reason in lines]  # sacct: `CANCELLED by 0`

    def preempted(self) -> bool:
        """Whether a job of more weight has asked this start of it to leave."""
        times = "--Format=StartTime:40,PreemptTime:40"
        started, _, asked = _asked(["squeue", *self._on(), "--noheader", f"--jobs={self.number}", times]).partition(" ")
        return asked.strip()[:1].isdigit() and asked.strip() >= started  # ISO, both in the controller's time zone

    def requeue(self) -> bool:
        """Queues it again, which ends what of it runs; False where Slurm refuses."""
        return _called(["scontrol", *self._on(), "requeue", self.number])

    def stay_ended(self) -> None:
        """Tells Slurm not to queue it again by itself, as it does after a preemption or a lost node."""
        _called(["scontrol", *self._on(), "update", f"JobId={self.number}", "Requeue=0"])

    def cancel(self) -> str:
        """Ends it: SIGTERM, and after Slurm's `KillWait` SIGKILL. Gives what Slurm said where it did not hear of it."""
        done = _done(["scancel", *self._on(), self.number])
        if done is None:
            return "scancel is not here, or does not answer"
        return " ".join(done.stderr.split()) or f"exit code {done.returncode}" if done.returncode else ""


def environment(outer: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a command of Slurm: ours, but nothing of a job that we may be in."""
    found = os.environ if outer is None else outer
    return {name: value for name, value in found.items() if not name.startswith(TASTES) or name in KEPT}


def run(command: list[str], environment: Mapping[str, str]) -> str:
    """What a command prints. Raises UserError with what Slurm said where it fails, or is not here."""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        what = f"there is no command `{command[0]}` here"
        raise UserError.of(what, "start the run where Slurm's commands are, such as a login node") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError.of(f"{command[0]} refused the job: {said}", "change the setting of launcher.* that it names")
    return done.stdout


def _asked(command: list[str]) -> str:
    """What a command answers; nothing where it fails, as for a job that is forgotten."""
    done = _done(command)
    return _plain(done.stdout) if done and not done.returncode else ""


def _plain(said: str) -> str:
    """Without the line that names a cluster before its jobs."""
    return re.sub(r"^CLUSTER: .*\n?", "", said, flags=re.MULTILINE).strip()


def _called(command: list[str]) -> bool:
    done = _done(command)
    return done is not None and not done.returncode


def _done(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, env=environment())
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
