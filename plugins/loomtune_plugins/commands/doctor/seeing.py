"""Whether the run's folder is one folder for all: what one rank has written and closed, every other must read.

Two rounds, because they fail differently: a file that is new (another file system, cached directories), and a file
whose content is replaced after others have read it (cached attributes: NFS promises close-to-open only).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

PAUSE = 0.01


def write(folder: Path, rank: int, word: str) -> None:
    """Leaves a word for the others, closed when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(rank)).write_text(word)


def read(folder: Path, ranks: Iterable[int], word: str, seconds: float) -> dict[str, Any]:
    """Looks for each rank's word. delay: seconds from now, when all had closed their files, until the last was seen."""
    began, delay = time.monotonic(), 0.0
    waiting = set(ranks)
    while waiting and time.monotonic() - began < seconds:
        seen = {rank for rank in waiting if _says(folder / str(rank), word)}
        if seen:
            delay = time.monotonic() - began
            waiting -= seen
        else:
            time.sleep(PAUSE)
    return {"delay": delay, "unseen": sorted(waiting)}


def _says(path: Path, word: str) -> bool:
    with suppress(OSError):
        return path.read_text() == word
    return False
