"""What the methods tell users: which settings have no sense, and what they should know once."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from loomtune.errors import Fault


def misset(settings: Any, *rows: tuple[str, bool, str, str]) -> list[Fault]:
    """A fault of each setting that does not fit. rows: (key, whether it fits, what is wrong, what would fit)."""
    return [
        Fault(f"adapter.{key}={getattr(settings, key)} {wrong}", f"set adapter.{key} to {right}")
        for key, fits, wrong, right in rows
        if not fits
    ]


@functools.cache
def say(text: str) -> None:
    """Once, on the first rank's stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(f"loomtune: {text}", file=sys.stderr)  # noqa: T201
