"""The process of an item: `python -m ...sweeps.item words...` is `loomtune train words...` at the hand of a sweep.

It is asked to leave, once, when the sweep that holds the other end of its standard input is no more, however that came.
(Linux's parent death signal comes once for every thread that the sweep had, and a second one ends a run at once.)
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from loomtune.cli import main


def follow() -> None:
    """Waits for the end of the standard input; what a launcher starts is handed the signal by it."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=follow, daemon=True).start()
    main(["train", *sys.argv[1:]])
