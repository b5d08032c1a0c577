"""Real processes of the command line: started, watched by their metrics, and killed with all their children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from loomtune_plugins.trackers import metrics

PATIENCE = 600.0
"""Seconds until a process that does not do what is waited for counts as hanging."""

COMMAND = [sys.executable, "-m", "loomtune.cli"]


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts; whatever still lives at the end is killed."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        kill_all(process)


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and its descendants, wherever their sessions are."""
    try:
        root = psutil.Process(process.pid)
        return [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Ends a whole tree at once, without a chance to write anything more."""
    members = tree(process)
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGSTOP)  # so that no parent mourns its child before it goes itself
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members, timeout=PATIENCE)
    process.wait()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Returns as soon as the metrics show a step."""
    began = time.monotonic()
    while not any(line["step"] >= step for line in metrics.read(folder)):
        assert process.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() - began < PATIENCE, f"step {step} was not reached"
        time.sleep(0.005)


def run(command: Sequence[str], log: Path, **environment: str) -> int:
    """Runs a command to its end; gives its exit code."""
    with log.open("ab") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env=os.environ | environment, timeout=PATIENCE, check=False
        )
    return done.returncode
