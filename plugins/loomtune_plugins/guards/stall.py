"""Processes that hang."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from loomtune.contracts import Guard, Judgement, Verdict
from loomtune.errors import UserError
from loomtune_plugins.guards.settings import StallSettings

if TYPE_CHECKING:
    from loomtune.run import Run

GRACE = 60.0


class Stall(Guard):
    """A watchdog on every rank: a lost peer or a dead file system makes a collective wait, often for ever.

    Where no step was judged for `seconds` it writes the stacks of all threads to `RUN/logs/stall-<rank>.txt` and to
    stderr and ends the process with status 1, so that the launcher notices. Guards hear of steps only: an evaluation or
    a checkpoint between two steps must fit into the time, so be generous.
    """

    def __init__(self, settings: StallSettings) -> None:
        if settings.seconds <= 0:
            raise UserError.of(f"guard.stall.seconds={settings.seconds} leaves no time", "set guard.stall.seconds=1800")
        self._seconds = settings.seconds
        self._over = threading.Event()
        self._last = 0.0
        self._file: TextIO | None = None

    def started(self, run: Run) -> None:
        """Begins to watch."""
        path = run.folder / "logs" / f"stall-{run.world.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._progress()
        threading.Thread(target=self._watch, args=(path, self._file), daemon=True, name="loomtune-stall").start()

    def judge(self, step: int, loss: float, gradient_norm: float) -> Judgement:
        """Takes the call for a sign of life; never objects."""
        self._progress()
        return Judgement(Verdict.CONTINUE)

    def waits(self) -> None:
        """A sign of life: whoever reads the rows has a time-out of its own."""
        self._progress()

    def finished(self, run: Run) -> None:
        """Ends the watch; the file goes with it, for there was nothing to write."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)

    def _progress(self) -> None:
        self._last = time.monotonic()
        if self._file is not None:
            # A call that hangs with the interpreter's lock held stops our thread too; this timer needs no lock.
            faulthandler.dump_traceback_later(self._seconds + GRACE, exit=True, file=self._file)

    def _watch(self, path: Path, file: TextIO) -> None:
        while not self._over.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            idle = time.monotonic() - self._last
            if idle >= self._seconds:
                self._end(path, file, idle)

    def _end(self, path: Path, file: TextIO, idle: float) -> None:
        message = f"loomtune: no step for {idle:.0f} s (guard.stall.seconds={self._seconds:g}); stacks are in {path}"
        for stream in (file, sys.stderr):
            print(message, file=stream, flush=True)
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()
        os._exit(1)
