"""One pass over a file's bytes: its digest, and where its lines can be read apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PIECE = 16 << 20
"""Bytes of a file that are read by one task, about."""

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Scan:
    """digest: sha256. starts: (position, number of the line there from 1) of about every 16 MB. size: in bytes."""

    digest: str
    starts: tuple[tuple[int, int], ...]
    size: int


def scan(path: Path) -> Scan:
    """What a file holds; read again only where it was changed since."""
    found = path.stat()
    return _scan(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _scan(path: Path, _size: int, _changed: int) -> Scan:
    digest, starts, position, line = hashlib.sha256(), [(0, 1)], 0, 1
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            due = starts[-1][0] + PIECE - position
            if due < len(block) and (end := block.find(b"\n", max(0, due))) >= 0:
                starts.append((position + end + 1, line + block.count(b"\n", 0, end + 1)))
            line += block.count(b"\n")
            position += len(block)
    return Scan(digest.hexdigest(), tuple(start for start in starts if start[0] < position or not start[0]), position)
