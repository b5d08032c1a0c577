"""A process beside an agent, which ends what the agent's ranks left behind if the agent itself is killed.

`python -I -S shadow.py MARK FOLDER`, by its path: it imports nothing but the standard library, so it costs little. It
waits for the end of its standard input, which the kernel closes with the agent.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "LOOMTUNE_JOB"
"""Stands in the environment of every rank; what they start inherits it, through forks and sessions of their own."""

PATIENCE = 10.0
"""Seconds in which a killed process must be gone; one in the kernel's uninterruptible sleep is not."""


def main(arguments: list[str]) -> None:
    """Waits for the agent's end, then clears away."""
    mark, folder = arguments
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what a scheduler sends to all processes of a job is not for us
    sys.stdin.buffer.read()
    end_marked(mark)
    shutil.rmtree(folder, ignore_errors=True)


def end_marked(mark: str) -> None:
    """Kills all processes of this machine with the mark in their environment, and what they start meanwhile."""
    until = time.monotonic() + PATIENCE
    while (found := marked(mark)) and time.monotonic() < until:
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def marked(mark: str) -> list[int]:
    """Processes that carry the mark, as far as this user may see; a dead one has no environment any more."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
