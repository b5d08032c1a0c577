"""Several nodes on one machine: network namespaces with links that can be cut, starved and counted.

Around `labs/netns.sh` of the shared folder. Other lab tests take `nodes` and a prefix and network of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support import SHARED

SCRIPT = SHARED / "labs" / "netns.sh"

PATIENCE = 300.0
"""Seconds until what is waited for counts as hanging."""


def why_not() -> str:
    """Why this machine can have no such nodes; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare", "bash") if shutil.which(name) is None]:
        return f"there is no {', '.join(missing)} here"
    if not SCRIPT.is_file():
        return f"{SCRIPT} is absent; LOOMTUNE_SHARED names the folder of labs"
    tried = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"try{os.getpid()}"], check=True)
    return ""


@dataclass(frozen=True)
class Nodes:
    """Nodes that see each other over a bridge and nothing else. Node i is host `<prefix><i>` at `<net>.<10 + i>`."""

    count: int
    prefix: str
    net: str

    def host(self, i: int) -> str:
        """Its name, which every node resolves."""
        return f"{self.prefix}{i}"

    def address(self, i: int) -> str:
        return f"{self.net}.{10 + i}"

    def run(
        self,
        i: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a node, in a session of its own; what it prints is added to the log, if there is one."""
        with (log or Path(os.devnull)).open("ab") as file:
            return subprocess.Popen(
                ["bash", str(SCRIPT), "exec", str(i), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment(environment),
                cwd=cwd,
                start_new_session=True,
            )

    def call(self, i: int, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """Runs a command on a node to its end; gives what it printed."""
        done = subprocess.run(
            ["bash", str(SCRIPT), "exec", str(i), *command],
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return done.stdout

    def cut(self, i: int) -> None:
        """Takes the node's link down."""
        self._script("cut", str(i))

    def heal(self, i: int) -> None:
        self._script("heal", str(i))

    def drop(self, i: int) -> None:
        """Loses all that the node sends and is sent; its link looks well."""
        self._script("drop", str(i))

    def undrop(self, i: int) -> None:
        self._script("undrop", str(i))

    def limit(self, i: int, rate: str) -> None:
        """Bounds the node's link in both directions, to `200mbit`, say."""
        self._script("limit", str(i), rate)

    def unlimit(self, i: int) -> None:
        self._script("unlimit", str(i))

    def sent(self, i: int) -> int:
        """Bytes that left the node since it was made."""
        said = subprocess.run(
            ["ip", "-n", self.host(i), "-s", "-j", "link", "show", "eth0"], capture_output=True, text=True, check=True
        )
        return int(json.loads(said.stdout)[0]["stats64"]["tx"]["bytes"])

    def pids(self, i: int) -> list[int]:
        """Processes of the node, those that have ended but were not waited for left out."""
        said = subprocess.run(["ip", "netns", "pids", self.host(i)], capture_output=True, text=True, check=False)
        return [pid for pid in map(int, said.stdout.split()) if _lives(pid)]

    def left(self, patience: float = 0.0) -> dict[str, list[str]]:
        """Command lines of what still runs after so many seconds at most, by host; empty where nothing does."""
        until = time.monotonic() + patience
        while True:
            found = {self.host(i): [_command(pid) for pid in self.pids(i)] for i in range(self.count)}
            found = {host: commands for host, commands in found.items() if commands}
            if not found or time.monotonic() >= until:
                return found
            time.sleep(0.2)

    def kill(self, i: int) -> None:
        """Ends all processes of a node at once, as a loss of power does."""
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that no parent mourns its child before it goes itself
            for pid in self.pids(i):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        until = time.monotonic() + PATIENCE
        while self.pids(i) and time.monotonic() < until:
            time.sleep(0.02)

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "LAB_PREFIX": self.prefix, "LAB_NET": self.net, **(more or {})}

    def _script(self, *arguments: str) -> None:
        command = ["bash", str(SCRIPT), *arguments]
        subprocess.run(command, env=self._environment(None), check=True, timeout=PATIENCE)


@contextmanager
def nodes(count: int, prefix: str, net: str) -> Iterator[Nodes]:
    """So many nodes; skips the test where this machine can have none. All that runs on them is killed at the end.

    prefix: short, small letters, of these nodes alone. net: three numbers of an IPv4 network, of these nodes alone.
    """
    if reason := why_not():
        pytest.skip(reason)
    made = Nodes(count, prefix, net)
    made._script("up", str(count))
    try:
        yield made
    finally:
        for i in range(count):
            made.kill(i)
        made._script("down")


def wait_for(*processes: subprocess.Popen[bytes], patience: float = PATIENCE) -> list[int]:
    """Exit codes of processes that `Nodes.run` started, once all have ended."""
    until = time.monotonic() + patience
    return [process.wait(max(0.0, until - time.monotonic())) for process in processes]


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command(pid: int) -> str:
    with suppress(psutil.NoSuchProcess):
        return f"{pid} {' '.join(psutil.Process(pid).cmdline())}"
    return f"{pid} (just ended)"
