"""The other end of a line between two ranks."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from loomtune_plugins.rollouts.line import Line


def line(port: int, me: int) -> Line:
    store = dist.TCPStore("127.0.0.1", port, 2, me == 0, timeout=timedelta(seconds=300))
    return Line(store, me, f"rank {1 - me} on there")


def echoes(port: int) -> None:
    """Says twice what it hears, until it hears nothing; `gone` ends the process."""
    other = line(port, 1)
    while (heard := other.hear()) is not None:
        if heard == "gone":
            os._exit(3)
        other.say([heard, heard], lambda: other.hears(0))
