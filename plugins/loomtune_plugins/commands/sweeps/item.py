"""The process of an item: `python -m loomtune_plugins.commands.sweeps.item PARENT words...` is `loomtune train words...`.

It is asked to leave when the sweep that started it ends, however that happens; its launcher hands that on to its ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from loomtune.cli import main

_SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def follow(parent: int) -> None:
    """Ties this process to its parent, which may have ended before it could ask for that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    follow(int(sys.argv[1]))
    main(["train", *sys.argv[2:]])
