"""Where the time of a step went, by the edges of its phases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

OTHER = "other"
"""Within a step and in no phase: sums over ranks, and what guards, trackers and the loop do there."""

STEP = ("data", "rollout", "forward", "backward", "optimizer", OTHER)
"""What a step's seconds are the sum of."""

FIRST = ("data", "rollout")
"""What a step begins with."""

Mark = TypeVar("Mark")


@dataclass(frozen=True, slots=True)
class Span(Generic[Mark]):
    """From one edge to the next, by a clock's marks, and what was done meanwhile."""

    phase: str
    begin: Mark
    end: Mark


class Timeline(Generic[Mark]):
    """Spans of a step, and of the evaluation and the checkpoint before it. A phase in another takes its time from that.

    now: a clock; what its marks mean is the reader's affair. began: when the current step did; None between steps.
    """

    def __init__(self, now: Callable[[], Mark]) -> None:
        self.spans: list[Span[Mark]] = []
        self.began: Mark | None = None
        self._now, self._stack, self._last = now, list[str](), now()

    def __call__(self, name: str, begins: bool) -> None:
        """An edge of a phase."""
        before, self._last = self._last, self._now()
        if self._stack or self.began is not None:
            self.spans.append(Span(self._stack[-1] if self._stack else OTHER, before, self._last))
        if not begins:
            self._stack.pop()
            return
        if self.began is None and not self._stack and name in FIRST:
            self.began = self._last
        self._stack.append(name)

    def end(self) -> Mark:
        """The step is over; gives when it was."""
        self.began = None
        return self._last

    def take(self, known: Callable[[Mark], bool] = lambda mark: True) -> list[Span[Mark]]:
        """The spans whose marks are known, in order; they are forgotten here, and the others stay for the next time."""
        count = next((i for i, span in enumerate(self.spans) if not known(span.end)), len(self.spans))
        taken, self.spans = self.spans[:count], self.spans[count:]
        return taken


def sums(spans: Sequence[Span[Any]], length: Callable[[Any, Any], float]) -> dict[str, float]:
    """Phase to the lengths of its spans, added up."""
    found: dict[str, float] = defaultdict(float)
    for span in spans:
        found[span.phase] += length(span.begin, span.end)
    return dict(found)
