"""Nothing outlives a node's agent: what ranks leave behind becomes its child, and is ended with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil

from loomtune_launchers.watching import shadow

PARENT = "LOOMTUNE_PARENT"
"""Names the process that ranks must not outlive, so that they know it even if it ends before they look."""

_SET_CHILD_SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER
_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def adopt() -> None:
    """Makes this process the parent of whatever its descendants leave behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """In a child, before it becomes another program: it is asked to end when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def end_descendants(spared: Collection[int] = ()) -> None:
    """Kills all descendants of this process, and what they start meanwhile, but for some children."""
    until = time.monotonic() + shadow.PATIENCE
    while (found := _living(spared)) and time.monotonic() < until:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.1)


def _living(spared: Collection[int]) -> list[psutil.Process]:
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.pid not in spared and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


class Shadow:
    """The process of `shadow.py`. mark: what ranks carry in their environment. folder: goes with the agent."""

    def __init__(self, folder: Path) -> None:
        self.mark = f"{os.getpid()}-{uuid4().hex}"
        command = [sys.executable, "-I", "-S", shadow.__file__, self.mark, str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def dismiss(self) -> None:
        """Lets it do its work, and waits until it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(shadow.PATIENCE)
