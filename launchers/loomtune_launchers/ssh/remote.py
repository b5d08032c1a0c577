"""The other side of launcher=ssh: `python -m loomtune_launchers.ssh.remote`, told everything on its standard input.

In come lines: an order (JSON), `go` and a meeting (JSON), later perhaps `stop SECONDS`. Out goes one line, the hello
(JSON behind `HELLO`), then what the agent says. Between them both sides send a NUL every few seconds: I am here. When
the input ends, or is silent for too long, the launcher is gone, and whatever runs here ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from loomtune_launchers import jobs, torchrun
from loomtune_launchers.watching import orphans

HELLO = "loomtune-hello "
BEAT = b"\0"

SLACK = 5
"""Seconds beyond the grace in which the agent may clear away what it had to kill."""

LAST = 5
"""Seconds to leave politely in, once nobody listens any more: a small model is saved in them, and no orphan stays."""

VISIBLE = 5.0
"""Seconds in which a file that was written elsewhere appears here: NFS remembers for some that there was none."""


def beat_every(patience: float) -> float:
    """Seconds between two signs of life: several fit into the other side's patience."""
    return min(3.0, patience / 5)


class Wire:
    """Lines from the launcher, and whether it is still there."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.heard = time.monotonic()
        self.closed = False
        self._rest = b""
        self._kept: list[str] = []

    @property
    def lost(self) -> bool:
        """Whether the launcher is gone."""
        return self.closed or time.monotonic() - self.heard > self.patience

    def line(self, seconds: float) -> str:
        """The next line, empty where none comes in that time."""
        if self.closed:
            time.sleep(seconds)
        elif not self._kept and select.select([0], [], [], seconds)[0]:
            said = os.read(0, 65536)
            self.heard, self.closed = time.monotonic(), not said
            *lines, self._rest = (self._rest + said.replace(BEAT, b"")).split(b"\n")
            self._kept += [line.decode() for line in lines]
        return self._kept.pop(0) if self._kept else ""

    def awaited(self) -> str:
        """The next line, whenever it comes; empty where the launcher is gone before."""
        while not (said := self.line(0.2)) and not self.lost:
            pass
        return said


class Agent:
    """The agent of this host, in a session of its own, and all that comes of it."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
        orphans.adopt()
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(_die_with, os.getpid()),  # noqa: PLW1509 - no other thread yet could hold a lock
        )
        self._until = float("inf")

    def stop(self, seconds: float) -> None:
        """Asks it to leave, and ends it after so many seconds; asked again, it only has less time."""
        if self._until == float("inf"):
            self.process.terminate()
        self._until = min(self._until, time.monotonic() + seconds)

    def ended(self) -> bool:
        """Whether it is over, by itself or now by us."""
        if time.monotonic() > self._until:
            self.clear()
        return self.process.poll() is not None

    def clear(self) -> None:
        """Ends all that still runs below this process, orphans too, which became children of ours."""
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(psutil.Process().children(recursive=True), timeout=1)  # those that end with it clear away
        orphans.end_descendants()

    @property
    def code(self) -> int:
        """Its exit code, as a shell says it."""
        code = self.process.returncode
        return code if code >= 0 else 128 - code


def main() -> int:
    """Serves one launcher; gives the agent's exit code."""
    wire = Wire(patience=60)
    order = json.loads(wire.awaited() or "{}")
    if not order:
        return 1
    wire.patience = order["patience"]
    print(f"\n{HELLO}{json.dumps(hello(order))}", flush=True)  # noqa: T201 - a shell may have begun a line
    word, _, said = wire.awaited().partition(" ")
    return _serve(wire, order, json.loads(said)) if word == "go" else 1


def hello(order: dict[str, Any]) -> dict[str, Any]:
    """What the launcher must know before any host begins; judged there, where cures can be given."""
    return {
        "host": socket.gethostname(),
        "loomtune": importlib.metadata.version("loomtune"),
        "torch": _version("torch"),
        "attempt": _attempt(Path(order["run"]), order["attempt"]),
        "folder": Path(order["folder"]).is_dir(),
        "resolves": _resolves(order["address"]),
        "address": os.environ.get("SSH_CONNECTION", "   ").split(" ")[2],
        "port": _free(order["port"]),
    }


def _serve(wire: Wire, order: dict[str, Any], met: dict[str, Any]) -> int:
    spec = jobs.read(json.dumps(order["job"]))
    environment = torchrun.environment(spec)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // spec.procs)))
    agent = Agent(torchrun.command(spec, torchrun.Meeting(**met)), environment, order["folder"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: agent.stop(spec.grace + SLACK))
    threading.Thread(target=_beat, args=(beat_every(wire.patience),), daemon=True).start()
    while not agent.ended():
        if said := wire.line(0.2):
            agent.stop(float(said.removeprefix("stop ")))
        if wire.lost:
            agent.stop(LAST)
    agent.clear()
    return agent.code


def _beat(seconds: float) -> None:
    """Until nobody listens; a connection that takes nothing more blocks this thread alone."""
    with suppress(OSError):
        while True:
            os.write(1, BEAT)
            time.sleep(seconds)


def _die_with(parent: int) -> None:
    """In the child, before it becomes the agent: asked to leave when we end, however that happens."""
    os.setsid()
    orphans.die_with_parent()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _version(distribution: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return ""


def _attempt(run: Path, expected: str) -> str:
    """The attempt that the run's folder speaks of: another one, or none, where it is not the launcher's folder."""
    until = time.monotonic() + VISIBLE
    while (found := _record(run)) != expected and time.monotonic() < until:
        time.sleep(0.5)
    return found


def _record(run: Path) -> str:
    with suppress(OSError, ValueError):
        return str(json.loads((run / jobs.RECORD).read_text()).get("attempt"))
    return ""


def _resolves(address: str) -> bool:
    with suppress(OSError):
        return bool(socket.getaddrinfo(address, None))
    return False


def _free(port: int) -> int:
    """The port, or for 0 any, if it can be listened on; 0 where it cannot."""
    with suppress(OSError), socket.create_server(("", port)) as server:
        return int(server.getsockname()[1])
    return 0


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # a thread may be waiting for a connection that takes nothing more
