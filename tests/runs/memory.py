"""The memory of a rank while it loads and saves: what a thread sees of `/proc/self/status`, phase by phase."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loomtune.checkpoint.memory import give_back
from loomtune.loop import Loop
from loomtune.world import World
from runs.ranks import assembled

INTERVAL = 0.001


def anonymous() -> int:
    """Bytes of this process that are its own: no files that are mapped, no memory that is shared."""
    with open("/proc/self/status") as status:  # noqa: PTH123 - read a thousand times a second
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch:
    """Peaks of this process's memory, in bytes above where it stood when the watch began."""

    def __init__(self) -> None:
        gc.collect()
        self.start = anonymous()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes the highest value that is met inside."""
        over = threading.Event()
        seen = [anonymous()]

        def look() -> None:
            while not over.is_set():
                seen.append(anonymous())
                time.sleep(INTERVAL)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.peaks[name] = max(*seen, anonymous()) - self.start


def attempt(world: World, folder: Path) -> dict[str, int]:
    """Builds the run of a prepared folder, goes on from its checkpoint if it has one, trains a step, and saves.

    Gives the peak of each phase, and what was held after two of them.
    """
    assembly = assembled(world, folder)
    watch = Watch()
    with watch.phase("birth"):
        assembly.build_roles()
    with watch.phase("restore"):
        assembly.keeper.restore()
    watch.peaks["restored"] = anonymous() - watch.start
    loop = Loop(assembly.run, assembly.keeper)
    with watch.phase("step"):
        loop._step(0.0)
    give_back()  # what is still there of the step's activations is not the save's
    with watch.phase("save"):
        assembly.keeper.save(loop._state(), best=False)
        assembly.keeper.finish()
    watch.peaks["after"] = anonymous() - watch.start
    return watch.peaks
