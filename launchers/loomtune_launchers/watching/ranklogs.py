"""What ranks said: `RUN/logs/<attempt>/<rank>/output.log`, written by agents, and read as one text in order of time.

A record is `<UTC time> <host> <o|e> <text>`, where o is standard output and e standard error. After a capital letter
no line ended: the text goes on in the next record of that stream. So the bytes that a rank wrote can be had again.
"""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FILE = "output.log"
EVERY = 0.3
"""Seconds between two looks at the files of a run that goes on."""

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A line of one rank. stamp: `2026-11-22T19:38:18.123456Z`. stream: see above."""

    stamp: str
    rank: int
    host: str
    stream: str
    text: str

    def __str__(self) -> str:
        return f"{self.stamp[11:23]} rank {self.rank} {self.host} | {self.text}"


def stamp(seconds: float) -> str:
    """A time since the epoch as records have it; sorts as a text."""
    micro = int(seconds * 1e6)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(micro // 1_000_000))}.{micro % 1_000_000:06d}Z"


def seconds(stamped: str) -> float:
    """The time of a stamp. Raises ValueError where it is none."""
    from calendar import timegm

    return timegm(time.strptime(stamped[:19], "%Y-%m-%dT%H:%M:%S")) + float(f"0.{stamped[20:26]}")


def named_by_time() -> str:
    """A name for an attempt that nobody named; names sort by time."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime())


def begin(run: Path, name: str) -> Path:
    """A new folder for an attempt: a restart of the same is `<name>.1`, `<name>.2`, ..."""
    number = 0
    while True:
        folder = run / "logs" / (f"{name}.{number}" if number else name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def attempts(run: Path) -> list[Path]:
    """The folders of a run's attempts, oldest first."""
    return sorted((path for path in (run / "logs").glob("*") if path.is_dir()), key=_age)


def _age(folder: Path) -> tuple[int, list[tuple[int, str]]]:
    """Names sort where times are equal, as in a copy: `<attempt>.2` before `<attempt>.10`."""
    parts = re.split(r"(\d+)", folder.name)
    return folder.stat().st_mtime_ns, [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def merged(run: Path, follow: bool = False, over: Callable[[], bool] = lambda: True) -> Iterator[str]:
    """The lines of all ranks, in order of time: of the newest attempt, and of those that come while it is followed.

    over: whether the run has ended, and writes nothing more. While following, lines of different nodes are in order as
    far as they are seen at the same time.
    """
    tails: dict[Path, Tail] = {}
    before = {folder.name for folder in attempts(run)[:-1]}
    told = ""
    while True:
        last = not follow or over()
        for folder in attempts(run):
            if folder.name in before:
                continue
            new = [tails.setdefault(path, Tail(path)) for path in sorted(folder.glob(f"*/{FILE}"))]
            for record in heapq.merge(*new, key=lambda record: record.stamp):
                if told != folder.name:
                    yield from [f"attempt {folder.name}"] if told else []
                    told = folder.name
                yield str(record)
        if last:
            return
        time.sleep(EVERY)


class Tail:
    """Records of one file, each given once, as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._rank = int(path.parent.name) if path.parent.name.isdigit() else -1
        self._stamp, self._host = "", ""

    def __iter__(self) -> Iterator[Record]:
        while lines := self._read():
            for line in lines:
                yield self._record(line[:-1].decode(errors="replace"))

    def _read(self) -> list[bytes]:
        """Some whole lines; the file is not kept open, for a run may have more ranks than a process may have files."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = [line for line in file.readlines(_CHUNK) if line.endswith(b"\n")]  # the last may be being written
        self._offset += sum(map(len, lines))
        return lines

    def _record(self, line: str) -> Record:
        parts = line.split(" ", 3)
        if len(parts) == 4 and parts[2] in "oOeE":
            self._stamp, self._host, stream, text = parts
            return Record(self._stamp, self._rank, self._host, stream, text)
        return Record(self._stamp, self._rank, self._host, "o", line)  # not ours, but somebody wrote it


def ending(path: Path, lines: int) -> list[str]:
    """The text of the last records of one rank."""
    if not path.is_file():
        return []
    return [record.text for record in _last(Tail(path), lines)]


def _last(records: Iterable[Record], count: int) -> list[Record]:
    from collections import deque

    return list(deque(records, maxlen=count))
