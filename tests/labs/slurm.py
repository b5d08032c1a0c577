"""A real Slurm of two nodes on one machine: around `labs/slurm.sh` of the shared folder.

Its commands work in the controller's namespace alone, so a folder of small scripts with their names, which is put first
on PATH, calls them there; on a node of the cluster they are the plain ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from support import SHARED

SCRIPT = SHARED / "labs" / "slurm.sh"
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sacct")
DAEMONS = ("slurmctld", "slurmd", "munged")

PATIENCE = 240.0
"""Seconds until what is waited for counts as hanging."""


def why_not() -> str:
    """Why there can be no such cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "the cluster's namespaces need root"
    if missing := [name for name in (*DAEMONS, *COMMANDS, "ip", "unshare") if shutil.which(name) is None]:
        return f"there is no {', '.join(missing)} here"
    if not SCRIPT.is_file():
        return f"{SCRIPT} is absent; LOOMTUNE_SHARED names the folder of labs"
    if Path("/run/netns/nodesw").exists():
        return "somebody else's cluster is up: its namespaces have the names of ours"
    return ""


@dataclass(frozen=True)
class Cluster:
    """Nodes node0 and node1 with partitions `low` (the default, whose jobs are preempted) and `high`."""

    folder: Path

    @property
    def commands(self) -> Path:
        """The folder for PATH."""
        return self.folder / "commands"

    def run(self, *command: str) -> str:
        """Runs a command where Slurm's answer; gives what it printed."""
        return self._script("run", *command)

    def processes(self, node: int) -> list[psutil.Process]:
        """Of a node, but for its daemon and what has ended."""
        said = subprocess.run(["ip", "netns", "pids", f"node{node}"], capture_output=True, text=True, check=False)
        found = []
        for pid in said.stdout.split():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if process.name() != "slurmd" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left(self) -> list[str]:
        """Command lines of what runs on the nodes beside their daemons."""
        found = []
        for process in [*self.processes(0), *self.processes(1)]:
            with suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return found

    def kill(self, node: int) -> None:
        """Ends everything on a node at once, its daemon too, as a power cut would."""
        pid = int((self.folder / "lab" / "pids" / f"slurmd.node{node}").read_text())
        for process in [psutil.Process(pid), *self.processes(node)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def revive(self, node: int) -> None:
        """Starts a killed node's daemon again."""
        self._script("node", str(node), "slurmd", "-N", f"node{node}")

    def _script(self, *words: str) -> str:
        environment = os.environ | {"SLURM_LAB": str(self.folder / "lab"), "SLURM_CONF": str(self._conf)}
        done = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"slurm.sh {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def _conf(self) -> Path:
        return self.folder / "lab" / "slurm.conf"

    def _begin(self) -> None:
        self.commands.mkdir()
        for name in COMMANDS:
            real = shutil.which(name)
            lab = f"SLURM_LAB='{self.folder}/lab' exec bash '{SCRIPT}' run {real} \"$@\""
            here = f'case $(hostname) in node*) exec {real} "$@";; esac'
            (self.commands / name).write_text(f"#!/bin/bash\n{here}\n{lab}\n")
            (self.commands / name).chmod(0o755)
        self._script("start")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two nodes, which are gone afterwards with all that ran on them."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets' paths must be short
    one = Cluster(folder)
    try:
        one._begin()
        yield one
    finally:
        one._script("stop")
        shutil.rmtree(folder)


def until(true: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Waits for something. Raises AssertionError naming it where it does not come."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, f"{what} did not happen within {patience:.0f} s"
        time.sleep(0.2)
