"""A node of launcher=ray: an actor of Ray that starts the agent, hands on what it says, and takes it along at its end.

`python -m loomtune_launchers.ray.node PARENT COMMAND...` becomes the command, which is asked to leave when PARENT ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from loomtune_launchers import jobs, torchrun

VISIBLE = 5.0
"""Seconds in which a file that was written elsewhere appears here: NFS remembers for some that there was none."""

RAY_S_OWN = ("RAY_",)
RAY_S_OWN_NAMES = ("PYTHONBREAKPOINT", "SPT_NOENV", "OMP_NUM_THREADS")
"""What Ray sets for its workers, which ranks would take for theirs. What it set for devices stays: they were given."""

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG

Said = tuple[bool, str]
"""Whether it was said on standard error, and a line."""


class Node:
    """Its methods are called one at a time, in the actor's main thread: the kernel counts the agent as that one's."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._agent: subprocess.Popen[bytes] | None = None

    def hello(self, run: str, attempt: str) -> dict[str, Any]:
        """What the launcher must know before any node begins."""
        import ray

        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        address = ray.util.get_node_ip_address()
        return {"host": socket.gethostname(), "address": address, "port": port, "sees": _sees(Path(run), attempt)}

    def start(self, job: str, meeting: dict[str, Any], folder: str) -> None:
        """Starts the agent, in a session of its own. folder: where the launcher was started, if that is here too."""
        spec = jobs.read(job)
        command = torchrun.command(spec, torchrun.Meeting(**meeting))
        self._agent = subprocess.Popen(
            (sys.executable, "-m", "loomtune_launchers.ray.node", str(os.getpid()), *command),
            env=torchrun.environment(spec, inherited(os.environ)),
            cwd=folder if Path(folder).is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for errors, stream in ((False, self._agent.stdout), (True, self._agent.stderr)):
            self._readers.append(threading.Thread(target=self._read, args=(errors, stream), daemon=True))
            self._readers[-1].start()

    def hear(self, seconds: float) -> tuple[list[Said], int | None]:
        """What was said since, waiting so long for the first of it; and the agent's exit code, None while it runs."""
        assert self._agent is not None
        said: list[Said] = []
        code = self._agent.poll()
        for reader in self._readers if code is not None else ():
            reader.join(1)  # what outlives the agent may hold its output open
        with suppress(queue.Empty):
            said += [self._said.get(timeout=0 if code is not None else seconds)]
            while True:
                said += [self._said.get_nowait()]
        return said, code

    def stop(self) -> None:
        """Asks the agent to leave."""
        if self._agent is not None:
            self._agent.terminate()

    def end(self) -> None:
        """Kills the agent and all below it."""
        if self._agent is not None:
            with suppress(psutil.NoSuchProcess):
                agent = psutil.Process(self._agent.pid)
                for process in [agent, *agent.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()

    def _read(self, errors: bool, stream: IO[bytes]) -> None:
        for line in stream:
            self._said.put((errors, line.decode(errors="replace")))


def inherited(outer: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment without what Ray set for the worker itself."""
    return {
        name: value for name, value in outer.items() if not name.startswith(RAY_S_OWN) and name not in RAY_S_OWN_NAMES
    }


def _sees(run: Path, attempt: str) -> bool:
    """Whether the run's folder is the launcher's: it speaks of this attempt."""
    until = time.monotonic() + VISIBLE
    while True:
        with suppress(OSError, ValueError):
            if json.loads((run / jobs.RECORD).read_text()).get("attempt") == attempt:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def main(arguments: list[str]) -> None:
    """Becomes the command. An actor has threads, so what is asked of the kernel is asked after the fork, here."""
    parent, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
