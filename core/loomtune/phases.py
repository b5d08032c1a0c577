"""Where a step is: the same words while it is measured, profiled and rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("data", "rollout", "forward", "backward", "optimizer", "checkpoint", "evaluation")
"""What a rank does between two steps' ends. `forward` includes the loss, `data` the making of its batches."""

Listener = Callable[[str, bool], None]
"""(phase, whether it begins): called around each, on every rank, in the order of `PHASES`' work. It never steers, calls
no collective and must not raise: the step is in the middle of its work."""


class Phases:
    """Marks what is being done. A phase may lie in another, whose time then does not count.

    listeners: who wants to know; anybody may add one, at `model_ready` for steps alone.
    """

    def __init__(self) -> None:
        self.listeners: list[Listener] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Within it the phase is `name`."""
        assert name in PHASES, f"{name} is no phase"
        self._tell(name, True)
        try:
            yield
        finally:
            self._tell(name, False)

    def _tell(self, name: str, begins: bool) -> None:
        for listener in self.listeners:
            listener(name, begins)
