"""Items that run: one in a process of its own here, or one that an engine has been given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from loomtune.contracts import JobStatus, Launcher
from loomtune.errors import LoomtuneError, Preempted
from loomtune_plugins.commands.sweeps.items import WENT, Item

SAID = 20
"""Lines of an item's log that stand for its error where nothing else does."""

BETWEEN, DOUBT = 2.0, 60.0
"""Seconds between two questions to an engine, and for which it may answer what need not last."""


class Running(ABC):
    """An item under way. stays: whether it goes on without the sweep."""

    stays = False

    def __init__(self, item: Item) -> None:
        self.item = item
        self.asked = self.pruned = False

    @abstractmethod
    def over(self) -> bool:
        """Whether it has ended; its item then says how."""

    def leave(self) -> None:
        """Asks it to end; what it committed stays."""
        if not self.asked:
            self.asked = True
            self._leave()

    @abstractmethod
    def _leave(self) -> None: ...

    @abstractmethod
    def kill(self) -> None:
        """Ends it at once."""

    def prune(self) -> None:
        """Asks it to end because others do better."""
        self.pruned = True
        self.leave()

    def _ended(self, status: str, error: str = "") -> None:
        """What was asked to end did not fail, even where it had not come as far as to hear that."""
        left = "pruned" if self.pruned else "preempted"
        self.item.ended(left, "") if self.asked and status not in WENT else self.item.ended(status, error)


class Process(Running):
    """`loomtune train` with an item's overrides; what it says goes to the item's log.

    It is in a process group of its own: a terminal's Ctrl-C comes to the sweep alone, which hands it on. It holds the
    lock of the sweep, so that a sweep that is started again waits until what the one before left has gone.
    """

    def __init__(self, item: Item, config_dirs: tuple[str, ...], environment: Mapping[str, str], lock: int) -> None:
        super().__init__(item)
        words = item.words()
        for folder in config_dirs:
            words += ["--config-dir", folder]
        with item.log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "loomtune_plugins.commands.sweeps.item", *words],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                process_group=0,
                pass_fds=(lock,),
            )

    def over(self) -> bool:
        code = self._child.poll()
        if code is None:
            return False
        if self._child.stdin:
            self._child.stdin.close()
        result = self.item.result()
        if code == Preempted.exit_code:
            self._ended("preempted")
        elif code == 0 and result:
            self._ended(result["status"])
        else:  # what ended before its run began left no result, or an old one
            self._ended("failed", str(result.get("error") or "") if code == 1 else _last(self.item.log))
        return True

    def _leave(self) -> None:
        self._child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._child.kill()


class Job(Running):
    """A run that an engine has been given: it needs no process here, and none of ours ends it but by its launcher."""

    stays = True

    def __init__(self, item: Item, launcher: Launcher) -> None:
        super().__init__(item)
        self._launcher = launcher
        self._asked = self._doubted = 0.0

    def over(self) -> bool:
        now = time.monotonic()
        if now - self._asked < BETWEEN:
            return False
        self._asked = now
        try:
            status = self._launcher.status(self.item.folder)
        except LoomtuneError as error:
            status = JobStatus("unknown", str(error))
        if status.state in ("unknown", "preempted"):  # not known yet, or about to be queued anew
            self._doubted = self._doubted or now
            if now - self._doubted < DOUBT and not self.pruned:
                return False
        elif status.state in ("pending", "running"):
            self._doubted = 0.0
            return False
        went = status.state in (*WENT, "preempted")
        self._ended(status.state if went else "failed", "" if went else f"{status.state}: {status.detail}")
        return True

    def _leave(self) -> None:
        self._launcher.cancel(self.item.folder)

    def kill(self) -> None:
        """Its launcher's `cancel` was that."""


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-SAID:]
    told = next((number for number, line in enumerate(lines) if line.startswith("loomtune:")), 0)
    return "\n".join(lines[told:]) or f"it ended without a word; see {log}"
