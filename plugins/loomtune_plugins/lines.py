"""The lines of a run's `metrics.jsonl`, whoever reads them: reports, comparisons, sweeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's folder, in order; none where there is no file."""
    return [record for _, record in whole(folder / NAME)]


def whole(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line with what it says. A line without its end, or that is no JSON object, is left out."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict):
            yield line, record
