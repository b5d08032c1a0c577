"""Which rank failed first, and why: peers' "connection closed" are consequences.

Each rank leaves its exception in torchrun's error file, `RUN/logs/<attempt>/<rank>/error.json`. For a rank that could
not, because a signal ended it, its agent does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune_launchers.watching import ranklogs

FILE = "error.json"
TAIL = 15
"""Lines of a traceback, or of what a rank said last, that are told."""

_AT_ONCE = 2.0
"""Seconds by which the time within a file, whole seconds in torch's format, may differ from the file's own."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank's failure. when: seconds since the epoch. waited: it hung because of another rank, as far as is known."""

    rank: int
    host: str
    when: float
    message: str
    traceback: str
    waited: bool
    log: Path

    @property
    def short(self) -> str:
        """Who and what, in one line."""
        return f"rank {self.rank} on {self.host}: {self.message}"

    def told(self, heard: bool) -> str:
        """For people. heard: whether the rank has spoken where this is shown."""
        lines = [f"loomtune: the first to fail was {self.short}"]
        if not heard:
            lines += self.traceback.rstrip().splitlines()[-TAIL:] or ranklogs.ending(self.log, TAIL)
        words = f"loomtune: all that it said is in {self.log}" if self.log.is_file() else "loomtune: it said nothing"
        return "\n".join([*lines, words])


def write(folder: Path, message: str, when: float, *, waited: bool = False, traceback: str = "") -> None:
    """Leaves a failure for a rank that could not, unless it did, in the format of torch's ErrorHandler."""
    extra = {"py_callstack": traceback, "timestamp": str(int(when)), "host": socket.gethostname(), "waited": waited}
    path = folder / FILE
    if path.exists():
        return
    with suppress(OSError):  # a full disk; what the agent says must do
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{FILE}.new"
        new.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        os.utime(new, (when, when))
        new.rename(path)


def read(folder: Path) -> Failure | None:
    """What the rank of a log folder left; None where that is nothing, or cannot be read."""
    path = folder / FILE
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        said: Any = json.loads(path.read_text())["message"]
        said = said if isinstance(said, dict) else {"message": said}
        extra = said.get("extraInfo") or {}
        when = path.stat().st_mtime
        if "timestamp" in extra and abs(float(extra["timestamp"]) - when) > _AT_ONCE:  # a copied file has another time
            when = float(extra["timestamp"])
        log = folder / ranklogs.FILE
        traceback, waited = str(extra.get("py_callstack", "")), bool(extra.get("waited"))
        host = extra.get("host") or _host(log)
        return Failure(int(folder.name), host, when, str(said["message"]), traceback, waited, log)
    return None


def _host(log: Path) -> str:
    with suppress(OSError, StopIteration):
        return next(iter(ranklogs.Tail(log))).host
    return "an unknown host"


def first(attempt: Path) -> Failure | None:
    """The cause: the earliest failure over all ranks of an attempt that did not merely wait for another."""
    found = [failure for folder in attempt.glob("[0-9]*") if (failure := read(folder))]
    return min(found, key=lambda failure: (failure.waited, failure.when), default=None)


def how(code: int) -> str:
    """How a process ended that said nothing, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    hint = "; where nobody sent it, the machine ran out of memory" if -code == signal.SIGKILL else ""
    return f"ended by signal {-code} ({name}){hint}"


def conclude(run: Path, cause: Failure | None, began: float, own: Collection[int]) -> None:
    """Sees to it that there is a `result.json`, which names the cause, unless a newer attempt has taken over the run.

    cause: None where the ranks were asked to leave. began: when they were started. own: their process ids.
    """
    lease = _json(run / "lease")
    if lease.get("time", 0) > began and lease.get("pid") not in own:
        return
    said = _json(run / "result.json")
    if not said:
        missing(run, cause.short if cause else None)
    elif cause and cause.rank != 0 and said["status"] == "failed":  # of itself rank 0 knows more than its agent
        _write(run, said | {"error": cause.short})


def missing(run: Path, error: str | None) -> None:
    """Writes a `result.json` where there is none. error: None where the run was asked to leave."""
    if not status(run):
        how = "failed" if error else "preempted"
        _write(run, {"status": how, "step": _step(run), "metrics": {}, "error": error})


def _write(run: Path, result: dict[str, Any]) -> None:
    """What cannot be written is told: nothing else of the end hangs on it."""
    new = run / "result.json.new"
    try:
        new.write_text(json.dumps(result, indent=1) + "\n")
        new.rename(run / "result.json")
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        print(f"loomtune: {run / 'result.json'} cannot be written: {error}", file=sys.stderr, flush=True)  # noqa: T201


def status(run: Path) -> str:
    """How the run ended, as its `result.json` says; empty where there is none."""
    return str(_json(run / "result.json").get("status", ""))


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _step(run: Path) -> int:
    """The last step that was written down."""
    with suppress(OSError):
        for line in reversed((run / "metrics.jsonl").read_bytes().splitlines()):
            with suppress(ValueError, LookupError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def settle(nodes: int) -> None:
    """Gives other nodes time to say what they know, where there are any."""
    if nodes > 1:
        time.sleep(_AT_ONCE)
