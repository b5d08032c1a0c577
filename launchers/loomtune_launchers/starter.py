"""The process that holds a run in the foreground, as others find it: by its host, its number, and when it began."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from loomtune.contracts import JobStatus
from loomtune_launchers import jobs

CLOSE = 1.0
"""Seconds by which the beginning of one process may seem to differ: it is counted from a clock that is set."""


def known(pid: int = 0) -> dict[str, Any]:
    """What is written down of a process of this host; 0 is this one. One that is gone never began."""
    began = 0.0
    with suppress(psutil.Error):
        began = psutil.Process(pid or None).create_time()
    return {"pid": pid or os.getpid(), "began": began, "host": socket.gethostname()}


def here(said: dict[str, Any]) -> bool:
    """Whether it was started on this host."""
    return bool(said["host"] == socket.gethostname())


def lives(said: dict[str, Any]) -> bool:
    """Whether it runs on this host; its number may long be another's."""
    if not here(said):
        return False
    with suppress(psutil.Error):
        process = psutil.Process(said["pid"])
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - said["began"]) < CLOSE)
    return False


def where(said: dict[str, Any]) -> str:
    """It, for people."""
    return f"process {said['pid']} on {said['host']}"


def left(run: Path, said: dict[str, Any], otherwise: str) -> JobStatus:
    """How a run stands whose process is gone. otherwise: the state where it left no result."""
    ended = jobs.ended(run)
    if (run / jobs.CANCELLED).exists() and (ended is None or ended.state == "preempted"):
        return JobStatus("cancelled", ended.detail if ended else where(said))
    return ended or JobStatus(otherwise, where(said))
