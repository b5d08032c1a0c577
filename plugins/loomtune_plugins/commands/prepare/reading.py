"""From the data's pieces to parts of canonical rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loomtune.contracts import Dropped, Row
from loomtune_plugins.commands.prepare.counts import READ, Counts
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.parts import BYTES, ROWS, STATS, Lines, committed, line_of, read_json
from loomtune_plugins.commands.prepare.refining import Refused


def read(work: Work, place: Path, task: dict[str, Any]) -> None:
    """Reads a piece into parts, each committed when it is full; one that was killed reads on over those.

    place: gets the name of the last; those before it are called `<piece>-<number>`.
    """
    made = list(_made(place))
    found = iter(work.data.read(task["piece"]))
    seen = sum(part["seen"] for part in made)
    next(itertools.islice(found, seen, seen), None)
    records = _Ahead(found)
    for number in itertools.count(len(made)):
        with committed(Path(f"{place}-{number:05d}")) as folder:
            _fill(folder, records, task["split"], work.job.keep_dropped)
        if records.ended:
            break
    with committed(place) as folder:
        (folder / STATS).write_text(json.dumps({"parts": number + 1}))


def parts(place: Path) -> Iterator[dict[str, Any]]:
    """What a piece that has been read fell into."""
    for number in range(read_json(place / STATS)["parts"]):
        name = f"{place.name}-{number:05d}"
        yield {"part": name, **read_json(place.with_name(name) / STATS)}


def _made(place: Path) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        part = Path(f"{place}-{number:05d}")
        if not part.is_dir():
            return
        yield read_json(part / STATS)


class _Ahead:
    """Records one after the other, with a look at whether there is another, and whose it is."""

    def __init__(self, found: Iterator[Row | Dropped]) -> None:
        self._found = found
        self._next: Row | Dropped | None = next(found, None)

    @property
    def ended(self) -> bool:
        """Whether there is none."""
        return self._next is None

    def take(self) -> tuple[Row | Dropped, bool]:
        """(the next, whether it is the last of what one record of the source gave)."""
        assert self._next is not None
        one, self._next = self._next, next(self._found, None)
        return one, self.ended or _origin(one) is None or _origin(one) != _origin(self._next)


def _fill(folder: Path, records: _Ahead, split: str, keep: bool) -> None:
    """One part: whole records, until it is large enough."""
    counts, lines, refused = Counts(), Lines(folder), Refused(folder if keep else None)
    seen = whole = 0
    while not records.ended and lines.size < BYTES and len(lines) < ROWS:
        last = False
        while not last:
            one, last = records.take()
            seen += 1
            if isinstance(one, Dropped):
                counts.dropped(READ, one)
                refused.add(READ, one)
            else:
                lines.add([line_of(one)])
        whole += 1
    counts.passed(READ, seen)
    lines.close()
    refused.close()
    told = {"seen": seen, "records": whole, "rows": len(lines), "bytes": lines.size, "split": split}
    (folder / STATS).write_text(json.dumps({**told, "counts": counts.stages}))


def _origin(one: Row | Dropped | None) -> Any:
    return one.origin if isinstance(one, Dropped) else one.get("origin") if one is not None else None
