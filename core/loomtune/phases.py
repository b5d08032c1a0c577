"""Where a step is: the same words while it is measured, profiled and rehearsed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("data", "rollout", "forward", "backward", "optimizer", "checkpoint", "evaluation")
"""What a rank does between two steps' ends. `forward` includes the loss, `data` the making of its batches."""

Listener = Callable[[str, bool], None]
"""(phase, whether it begins): called around each, on every rank, in the order of `PHASES`' work; never steers."""


class Phases:
    """Marks what is being done. A phase may lie in another, whose time then does not count.

    seconds: spent in each by the host's clock since it was cleared; what a device still computes is not waited for.
    listeners: who else wants to know.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.listeners: list[Listener] = []
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Within it the phase is `name`."""
        assert name in PHASES, f"{name} is no phase"
        self._turn()
        self._stack.append(name)
        self._tell(name, True)
        try:
            yield
        finally:
            self._turn()
            self._tell(self._stack.pop(), False)

    def _turn(self) -> None:
        """Gives the time until now to the phase that it was spent in."""
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _tell(self, name: str, begins: bool) -> None:
        for listener in self.listeners:
            listener(name, begins)
