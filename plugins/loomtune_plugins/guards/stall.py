"""Processes that hang."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Guard, Judgement, Verdict
from loomtune.errors import UserError
from loomtune_plugins.guards.settings import StallSettings

if TYPE_CHECKING:
    from loomtune.run import Run

GRACE = 60.0
_ERRORS = 2  # stderr
HEARTBEATS = "LOOMTUNE_HEARTBEATS"
"""Names a folder of this node, where an agent watches over its ranks."""


class Stall(Guard):
    """A watchdog on every rank: a lost peer or a dead file system makes a collective wait, often for ever.

    Where no step was judged for `seconds` it writes the stacks of all threads to `RUN/logs/stall-<rank>.txt` and to
    stderr and ends the process with status 1, so that the launcher notices. Guards hear of steps, and of pieces of a
    rollout or an evaluation: one of these, or a checkpoint, must fit into the time, so be generous.

    Where an agent watches over the node's ranks it gets the signs of life and ends them all, the stacks of all at hand;
    this process then waits a minute longer. It writes its stacks for the agent on SIGUSR2, whatever it hangs in.
    """

    def __init__(self, settings: StallSettings) -> None:
        if settings.seconds <= 0:
            raise UserError.of(f"guard.stall.seconds={settings.seconds} leaves no time", "set guard.stall.seconds=1800")
        self._seconds = settings.seconds
        self._over = threading.Event()
        self._last = 0.0
        self._path: Path | None = None
        self._beats: Beats | None = None

    def started(self, run: Run) -> None:
        """Begins to watch."""
        self._path = path = run.folder / "logs" / f"stall-{run.world.rank}.txt"
        if folder := os.environ.get(HEARTBEATS):
            self._beats = Beats(Path(folder), run.world.rank, self._seconds)
        self._progress(getattr(run, "step", 0))
        threading.Thread(target=self._watch, args=(path,), daemon=True, name="loomtune-stall").start()

    def judge(self, step: int, loss: float, gradient_norm: float) -> Judgement:
        """Takes the call for a sign of life; never objects."""
        self._progress(step)
        return Judgement(Verdict.CONTINUE)

    def waits(self) -> None:
        """A sign of life: all ranks answered, or whoever reads the rows has a time-out of its own."""
        self._progress()

    def finished(self, run: Run) -> None:
        """Ends the watch."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._beats is not None:
            self._beats.close()

    @property
    def _allowed(self) -> float:
        """Seconds of silence after which this process ends itself."""
        return self._seconds + (GRACE if self._beats else 0.0)

    def _progress(self, step: int | None = None) -> None:
        self._last = time.monotonic()
        if self._beats is not None:
            self._beats.beat(step, self._last)
        if self._path is not None:
            # A call that hangs with the interpreter's lock held stops our thread too; this timer needs no lock.
            faulthandler.dump_traceback_later(self._allowed + GRACE, exit=True, file=_ERRORS)

    def _watch(self, path: Path) -> None:
        while not self._over.wait(max(0.0, self._last + self._allowed - time.monotonic())):
            idle = time.monotonic() - self._last
            if idle >= self._allowed:
                self._end(path, idle)

    def _end(self, path: Path, idle: float) -> None:
        """Says it on stderr first: the file system may be what hangs; the timer then ends this process."""
        message = f"loomtune: no step for {idle:.0f} s (guard.stall.seconds={self._seconds:g}); stacks are in {path}\n"
        self._say(_ERRORS, message)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                self._say(file.fileno(), message)
        os._exit(1)

    @staticmethod
    def _say(fd: int, message: str) -> None:
        os.write(fd, message.encode())
        faulthandler.dump_traceback(fd, all_threads=True)


class Beats:
    """Signs of life in the node's folder: `<rank>` says when the last was, after which step, and how long silence may
    last; `<rank>.stacks` gets the stacks of all threads on SIGUSR2, which needs no lock of the interpreter."""

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self._path, self._seconds, self._step = folder / str(rank), seconds, 0
        self._stacks = (folder / f"{rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def beat(self, step: int | None, when: float) -> None:
        """when: by CLOCK_MONOTONIC, which all processes of a node share. step: None for the same as before."""
        self._step = self._step if step is None else step
        new = self._path.with_suffix(".new")
        with suppress(OSError):  # a full disk there is no reason to end a run
            new.write_text(json.dumps({"beat": when, "seconds": self._seconds, "step": self._step}))
            new.rename(self._path)

    def close(self) -> None:
        """No more is to be expected of this process."""
        self._path.unlink(missing_ok=True)
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._stacks.close()
