"""Answers on disk: a file of JSON lines that only grows, which several processes may write and people may read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from loomtune.errors import RunFailed
from loomtune_plugins.endpoint.asking import Reply

NAME = "answers.jsonl"


def key_of(*parts: Any) -> str:
    """Digest of all that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def default_folder() -> Path:
    """`$LOOMTUNE_CACHE/answers`, or `~/.cache/loomtune/answers`."""
    named = os.environ.get("LOOMTUNE_CACHE")
    return Path(named, "answers") if named else Path.home() / ".cache" / "loomtune" / "answers"


class Answers:
    """Those of one folder.

    A line is written whole, under a lock, and is on the disk before anybody is told of it. What a kill left of a line
    is passed over, and so is what is no line of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._places: dict[str, tuple[int, int]] = {}
        self._read = 0
        self._cost = 0.0

    @property
    def cost(self) -> float:
        """What all of them cost, by whatever process, those that were of no use included."""
        self._look()
        return self._cost

    def find(self, key: str) -> Reply | None:
        """The answer kept under a key, if there is one."""
        self._look()
        if (place := self._places.get(key)) is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place[0])
            kept = json.loads(file.read(place[1]))["reply"]
        return Reply(**{**kept, "tokens": tuple(kept["tokens"])})

    def keep(self, key: str, asked: Mapping[str, Any], reply: Reply, cost: float) -> None:
        """Appends one. asked: who was asked what, for those who read. A failed reply is kept for its cost alone."""
        line = {"key": key, "cost": cost, "reply": asdict(reply), "asked": asked}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _end_line(file)
                file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            cure = "make room there, or name another folder; the same command goes on"
            raise RunFailed(f"answers cannot be kept in {self.path}: {error}\n    cure: {cure}") from error

    def _look(self) -> None:
        """Takes notice of the lines that were written since."""
        if not self.path.exists() or self.path.stat().st_size <= self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # another process is at it, or was
                self._notice(line, self._read)
                self._read += len(line)

    def _notice(self, line: bytes, place: int) -> None:
        try:
            told = json.loads(line)
            key, cost, failed = str(told["key"]), float(told["cost"]), told["reply"]["failed"]
        except (ValueError, LookupError, TypeError):
            return
        self._cost += cost
        if not failed:
            self._places.setdefault(key, (place, len(line)))  # the first stays, whoever asked again


def _end_line(file: BinaryIO) -> None:
    """Begins a new line where a kill cut the last one short."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
