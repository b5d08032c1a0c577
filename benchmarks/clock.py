"""When each optimizer step ended, in wall and CPU seconds, and the memory it took: one clock for all contenders."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

OUT = "BENCH_OUT"
"""Environment variable that names the file of results."""


class Clock:
    """Marks of one process. A step's time runs from the end of the one before it: nothing is left out."""

    def __init__(self) -> None:
        self.marks: list[dict[str, float]] = []

    def mark(self, examples: int, **said: float) -> None:
        """A step has ended. said: what the contender says of it, such as its `loss`, before the step's update."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append(
            {
                "wall": time.perf_counter(),
                "cpu": used.ru_utime + used.ru_stime,
                "system": used.ru_stime,
                "peak_bytes": used.ru_maxrss * 1024,
                "examples": examples,
                **said,
            }
        )

    def write(self) -> None:
        """Leaves the marks for the process that started this one."""
        Path(os.environ[OUT]).write_text(json.dumps(self.marks))


CLOCK = Clock()
