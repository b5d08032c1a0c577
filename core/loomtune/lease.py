"""Which attempt may write to a run's folder: the last that took the lease."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from loomtune.checkpoint.files import replace_text
from loomtune.errors import LeaseLost


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one attempt to write. Rank 0 takes it; others make theirs from the folder and the attempt's name.

    It is asked just before anything is committed. An attempt that was thought dead (a node cut off, say) so stops at
    its next commit; what it wrote until then lies in temporary folders of its own.
    """

    folder: Path
    attempt: str

    @classmethod
    def take(cls, folder: Path) -> Lease:
        """Begins a new attempt, which supersedes all before it. Names of attempts sort by time."""
        attempt = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid4().hex[:6]}"
        holder = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "lease", json.dumps(holder) + "\n")
        return cls(folder, attempt)

    def shows(self, seconds: float) -> bool:
        """Whether the lease is seen here; a shared folder may take some seconds to show it."""
        until = time.monotonic() + seconds
        while not (held := self._held()) and time.monotonic() < until:
            time.sleep(0.2)
        return held

    def _held(self) -> bool:
        with suppress(LeaseLost, OSError):
            self.check()
            return True
        return False

    def check(self) -> None:
        """Raises LeaseLost where another attempt has taken over, naming it, or where the lease is gone."""
        try:
            holder = json.loads((self.folder / "lease").read_text())
            if holder["attempt"] == self.attempt:
                return
            who = f"attempt {holder['attempt']} (process {holder['pid']} on {holder['host']}) writes"
        except FileNotFoundError:
            who = "its lease was removed: no attempt may write"
        except (ValueError, LookupError, TypeError):
            who = "its lease cannot be read: no attempt may write"
        raise LeaseLost(f"{self.folder}: {who} to this run, not attempt {self.attempt}")
