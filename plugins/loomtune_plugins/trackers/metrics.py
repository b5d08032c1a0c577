"""`metrics.jsonl`: one JSON object for each optimizer step, in a file that a kill at any instant leaves readable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from loomtune_plugins.lines import NAME, read, whole

__all__ = ["NAME", "MetricsLog", "read"]


class MetricsLog:
    """Writes the lines of a run, one process at a time.

    A line is in the file as soon as `append` returns, so a killed process loses none; `sync` makes that hold for a
    machine that loses power too. What an evaluation finds after the step joins the step's line by `amend`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: BinaryIO | None = None
        self._last: dict[str, Any] = {}
        self._last_at = 0

    @property
    def step(self) -> int | None:
        """Step of the last line written or kept by this object; None before the first."""
        return self._last.get("step")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a line. Floats are in full precision; NaN and infinity become null, and `nonfinite` names them."""
        file = self._opened()
        self._last, self._last_at = dict(record), file.seek(0, os.SEEK_END)
        file.write(_line(self._last))

    def amend(self, more: Mapping[str, Any]) -> None:
        """Adds keys to the last line, or replaces their values."""
        file = self._opened()
        assert self._last, "there is no line to add to"
        self._last.update(more)
        file.seek(self._last_at)
        file.write(_line(self._last))  # one write over the old line, which is rarely longer
        file.truncate()

    def cut(self, step: int) -> None:
        """Keeps the whole lines up to a step and drops later ones and a torn end; -1 empties the file. Atomic."""
        self.close()
        kept = [line for line, record in whole(self.path) if record.get("step", 0) <= step]
        draft = self.path.with_suffix(".jsonl.new")
        with draft.open("wb") as file:
            file.writelines(kept)
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._last = json.loads(kept[-1]) if kept else {}
        self._last_at = sum(map(len, kept[:-1]))

    def sync(self) -> None:
        """Waits until the disk has every line."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; writing opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self.path.touch()
            self._file = self.path.open("r+b", buffering=0)
        return self._file


def _line(record: Mapping[str, Any]) -> bytes:
    """JSON has no NaN and no infinity: they become null, and `nonfinite` names them."""
    values = {key: value for key, value in record.items() if key != "nonfinite"}
    plain = {key: value if isinstance(value, str | int | None) else float(value) for key, value in values.items()}
    odd = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    odd += [key for key in record.get("nonfinite", ()) if plain.get(key) is None]
    plain |= dict.fromkeys(odd)
    return (json.dumps({**plain, "nonfinite": odd} if odd else plain, allow_nan=False) + "\n").encode()
