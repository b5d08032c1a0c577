"""A node's watch over its ranks: where one gives no sign of life, all say where they are, and are ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HEARTBEATS = "LOOMTUNE_HEARTBEATS"
"""Names the node's folder to which each rank writes `<rank>`: JSON with `seconds`, that silence may last, the `step` it
last saw, and `beat`, the time of CLOCK_MONOTONIC; and `<rank>.stacks`, on SIGUSR2."""

STACKS = "stacks.txt"
TRACE = "nccl-flight-recorder"
EVERY = 0.5
PATIENCE = 3.0
"""Seconds for a rank to write its stacks; who hangs in the kernel does not."""

_PY_SPY = 20.0  # seconds


@dataclass(frozen=True, slots=True)
class Rank:
    """A process under watch. folder: of its logs. beats: of the node's heartbeats."""

    number: int
    pid: int
    folder: Path
    beats: Path

    def beat(self) -> Beat | None:
        """Its last sign of life; None where it is not to be watched: not yet, or no more."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            said = json.loads((self.beats / str(self.number)).read_text())
            return Beat(float(said["beat"]), float(said["seconds"]), int(said["step"]))
        return None


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life."""

    when: float
    seconds: float
    step: int


@dataclass(frozen=True, slots=True)
class Found:
    """Where a rank was when it was looked at. reason: why it is taken for one that others wait for; empty: it waits."""

    rank: Rank
    step: int
    beat: float
    reason: str


class Watchdog:
    """Looks after a group of ranks until it is closed. told: hears of the rank that is furthest behind."""

    def __init__(self, ranks: Sequence[Rank], told: Callable[[Found, float], None]) -> None:
        self._ranks, self._told = ranks, told
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="loomtune-watchdog")
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; one that is at work finishes first."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            now = time.monotonic()
            if any((beat := rank.beat()) and now - beat.when > beat.seconds for rank in self._ranks):
                self._end(now)
                return

    def _end(self, now: float) -> None:
        found = [looked for looked in look(self._ranks) if looked is not None]
        if found:
            behind = min(found, key=lambda one: (not one.reason, one.step, one.beat))
            self._told(behind, now - behind.beat)
        for rank in self._ranks:
            with suppress(OSError):
                os.killpg(rank.pid, signal.SIGKILL)


def look(ranks: Sequence[Rank]) -> list[Found | None]:
    """Takes the stacks of all ranks at the same time, to `stacks.txt` in the folder of each one's logs."""
    beats = {rank.number: rank.beat() for rank in ranks}
    for rank in ranks:
        if beats[rank.number]:  # before its first beat the signal would end it
            with suppress(OSError):
                os.kill(rank.pid, signal.SIGUSR2)
    recorders = [rank for rank in ranks if _ask_nccl(rank)]
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and not (
        all(_said(rank) for rank in ranks if beats[rank.number]) and all(_trace(rank).exists() for rank in recorders)
    ):
        time.sleep(0.05)
    with ThreadPoolExecutor(min(16, len(ranks))) as pool:  # py-spy may take its time with each of many
        return list(pool.map(lambda rank: _looked_at(rank, beats[rank.number]), ranks))


def _looked_at(rank: Rank, beat: Beat | None) -> Found | None:
    said, state = _said(rank), _state(rank.pid)
    parts = [f"rank {rank.number}, process {rank.pid}", *([said] if said else ["it did not write its stacks"])]
    parts += [_py_spy(rank.pid), _kernel(rank.pid)]
    with suppress(OSError):
        (rank.folder / STACKS).write_text("\n\n".join(part for part in parts if part) + "\n")
    with suppress(OSError):
        shutil.copyfile(_trace(rank), rank.folder / TRACE)
    return Found(rank, beat.step, beat.when, _reason(said, state)) if beat else None


def _reason(said: str, state: str) -> str:
    """Why a rank is one that others wait for: it does not run, or it is not in a call of torch, as who waits is."""
    if state[:1] in ("T", "t", "D", "Z"):
        return f"its process is in state {state}"
    if not said:
        return "it did not answer"
    frame = innermost(said)
    return "" if not frame or "/torch/" in frame else f"it is in {frame}"


def innermost(stacks: str) -> str:
    """The innermost frame of the main thread, which faulthandler writes last: `<file> line <n> in <function>`."""
    _, _, main = stacks.rpartition("hread 0x")
    frames = [line.strip() for line in main.splitlines() if line.lstrip().startswith("File ")]
    return frames[0].removeprefix("File ").replace('"', "").replace(", line", " line") if frames else ""


def _said(rank: Rank) -> str:
    with suppress(OSError):
        return (rank.beats / f"{rank.number}.stacks").read_text(errors="replace").strip()
    return ""


def _py_spy(pid: int) -> str:
    """The stacks as py-spy sees them, which asks nothing of the process. Where it is installed."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY, check=False)
        return f"py-spy:\n{done.stdout or done.stderr}".rstrip()
    return "py-spy gave no answer"


def _state(pid: int) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.split(":")[1].strip()
    return ""


def _kernel(pid: int) -> str:
    """What each thread waits for in the kernel."""
    lines = [f"kernel: {_state(pid)}"]
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with suppress(OSError):
            lines.append(f"{thread.name} {(thread / 'comm').read_text().strip()}: {(thread / 'wchan').read_text()}")
    return "\n".join(lines)


def flight_recorder(beats: Path) -> dict[str, str]:
    """What makes NCCL keep a record of its collectives, and write it when its pipe is written to, or at a time-out."""
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(beats / TRACE),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(beats / f"{TRACE}.pipe."),
    }


def _ask_nccl(rank: Rank) -> bool:
    """Asks for the record, where NCCL listens."""
    with suppress(OSError):
        fd = os.open(rank.beats / f"{TRACE}.pipe.{rank.number}.pipe", os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, b"1\n")
        os.close(fd)
        return True
    return False


def _trace(rank: Rank) -> Path:
    return rank.beats / f"{TRACE}{rank.number}"
