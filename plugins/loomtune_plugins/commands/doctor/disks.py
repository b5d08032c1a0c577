"""How much room there is, and how fast it is written, by each node's first rank, all at once, as checkpoints are."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

BLOCK = 16 << 20
"""Bytes between two fsync: about a shard of a small tensor; larger than what caches of network file systems hide."""

SHARED_MEMORY = Path("/dev/shm")


def places(folder: Path) -> dict[str, Path]:
    """What a run writes to."""
    cache = os.environ.get("LOOMTUNE_CACHE")
    kept = Path(cache) if cache else Path.home() / ".cache" / "loomtune" / "samples"
    found = {"run folder": folder, "cache": kept}
    return found | ({"shared memory": SHARED_MEMORY} if SHARED_MEMORY.is_dir() else {})


def disks(folder: Path, seconds: float, most: int) -> dict[str, Any]:
    """Each place as `disk` gives it, or the error that it gave."""
    found: dict[str, Any] = {}
    for name, place in places(folder).items():
        try:
            found[name] = disk(place, seconds, most)
        except OSError as error:
            found[name] = {"path": str(place), "error": str(error)}
    return found


def disk(place: Path, seconds: float, most: int) -> dict[str, Any]:
    """Room, and bytes a second of writing with fsync, for so many seconds and bytes at most."""
    place.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(place)
    said = {"path": str(place), "kind": kind(place), "total": room.total, "free": room.free}
    return said | {"written": _speed(place, seconds, min(most, room.free // 4)), "opened": _latency(place)}


def _speed(place: Path, seconds: float, most: int) -> float | None:
    """None where there is no room for a block."""
    if most < BLOCK:
        return None
    block, path, written = os.urandom(BLOCK), place / f".doctor-{os.uname().nodename}-{os.getpid()}", 0
    with path.open("wb", buffering=0) as file:
        path.unlink()  # it goes with us, however we end
        began = time.perf_counter()
        while written + BLOCK <= most and time.perf_counter() - began < seconds:
            written += file.write(block)
            os.fsync(file.fileno())
        return written / (time.perf_counter() - began)


def _latency(place: Path) -> float:
    """Seconds to make and take away an empty file, the least of several: how soon its server answers."""
    path, taken = place / f".doctor-{os.uname().nodename}-{os.getpid()}", []
    for _ in range(5):
        began = time.perf_counter()
        path.touch()
        path.unlink()
        taken.append(time.perf_counter() - began)
    return min(taken)


def kind(place: Path) -> str:
    """The type of its file system, such as `nfs4`; empty where that is not told."""
    real = place.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
