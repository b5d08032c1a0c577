"""Preparing in one process, with toy data and stages, and parts so small that a few hundred rows make many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loomtune.contracts import Data, Dropped, DuplicateStage, Row, RowStage, SplitStage
from loomtune_plugins.commands.prepare import comparing, equality, job, meeting, parts, reading, shuffling
from loomtune_plugins.commands.prepare.flow import Flow
from loomtune_plugins.commands.prepare.job import Job, Work
from loomtune_plugins.commands.prepare.phases import Phases
from loomtune_plugins.commands.prepare.tasks import carry_out

REACH = 3
"""Points this near to each other are alike."""


class Points(Data):
    """Numbers, in pieces of 60, by split. Words in their place are bad records."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.of: Mapping[str, Sequence[Any]] = settings["points"]

    def check(self) -> None: ...

    def splits(self) -> tuple[str, ...]:
        return tuple(self.of)

    def rows(self, split: str) -> Iterator[Row]:
        raise AssertionError("preparing reads pieces")

    def pieces(self, split: str) -> Sequence[Mapping[str, Any]]:
        return [{"split": split, "begin": begin} for begin in range(0, len(self.of[split]), 60)]

    def read(self, piece: Mapping[str, Any]) -> Iterator[Row | Dropped]:
        split, begin = piece["split"], piece["begin"]
        for number, point in enumerate(self.of[split][begin : begin + 60], start=begin + 1):
            if isinstance(point, str):
                yield Dropped(f"{split}:{number}", "no number", point)
            else:
                yield {"text": f"point {point}", "point": point, "origin": f"{split}:{number}"}

    def fingerprint(self) -> str:
        return json.dumps(self.of)


def described(rows: Sequence[Row]) -> Any:
    return np.array([row["point"] for row in rows], np.int64)


def near(one: Any, other: Any) -> Any:
    return (1.0 - np.abs(one - other) / 100).astype(np.float32)


def bands(points: Any) -> Any:
    """Points that are alike share one of these, unless they lie across all borders."""
    return np.stack([points // 4, (points + 2) // 4], axis=1).astype(np.uint64)


class Apart(DuplicateStage):
    threshold, reason = 1.0 - REACH / 100, "near another"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self.limit = settings, settings.get("limit", 0)

    describe = staticmethod(described)
    alike = staticmethod(near)

    def keys(self, points: Any) -> Any:
        return None if self.settings.get("each") else bands(points)


class Lonely(Apart):
    """Points divisible by 7 are alike to nothing, not even to themselves."""

    @staticmethod
    def alike(one: Any, other: Any) -> Any:
        return np.where((one % 7 == 0) | (other % 7 == 0), 0, near(one, other)).astype(np.float32)


class Grouped(SplitStage):
    threshold = 1.0 - REACH / 100

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    describe = staticmethod(described)
    alike = staticmethod(near)

    def keys(self, points: Any) -> Any:
        return bands(points)

    def shares(self) -> Mapping[str, float]:
        shares: Mapping[str, float] = self.settings.get("shares", {"train": 0.6, "validation": 0.2, "test": 0.2})
        return shares


class Odd(RowStage):
    """Drops odd points, and says `even` of the others."""

    def __init__(self, settings: Mapping[str, Any]) -> None: ...

    def apply(self, rows: Sequence[Row]) -> Sequence[Row | Dropped]:
        return [self._judged(row) for row in rows]

    def _judged(self, row: Row) -> Row | Dropped:
        if row["point"] == 13:
            raise ValueError("unlucky")
        return (
            Dropped(row["origin"], "odd", row=row)
            if row["point"] % 2
            else {**row, "text": "even \x1b[31m" + row["text"]}
        )


STAGES = {"apart": Apart, "lonely": Lonely, "grouped": Grouped, "odd": Odd}


class Toys:
    """Stands in for the catalogue."""

    def build(self, axis: str, name: str, settings: Mapping[str, Any]) -> Any:
        return Points(settings) if axis == "data" else STAGES[name](settings)


class Here:
    """Carries tasks out in this process. last: after how many of them it is killed."""

    def __init__(self, last: int | None = None) -> None:
        self.done, self.last = 0, last

    def carry_out(self, tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for task in tasks:
            if self.done == self.last:
                raise KeyboardInterrupt
            yield carry_out(json.loads(json.dumps(task)))
            self.done += 1

    def close(self) -> None: ...


@dataclass
class Outcome:
    manifest: dict[str, Any]
    files: dict[str, bytes]

    def rows(self, split: str = "train") -> list[Row]:
        names = sorted(name for name in self.files if name.startswith(split))
        return [json.loads(line) for name in names for line in self.files[name].splitlines()]

    def points(self, split: str = "train") -> list[int]:
        return [row["point"] for row in self.rows(split)]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a loss of power would show the difference, and it takes most of the time."""
    monkeypatch.setattr(parts, "sync", lambda path: None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a dozen rows, buckets of some records, and toys to choose from."""
    monkeypatch.setattr(reading, "ROWS", 25)
    monkeypatch.setattr(shuffling, "BUCKET", 2048)
    monkeypatch.setattr(meeting, "RUN", 50)
    monkeypatch.setattr(comparing, "ROWS", 11)
    monkeypatch.setattr(comparing, "COMPARED", 7)
    monkeypatch.setattr(equality, "SOME", 7)
    monkeypatch.setattr(comparing, "BLOCK", 3)
    monkeypatch.setattr(comparing, "BLOCKS", 5)
    monkeypatch.setattr(job, "installed", Toys)


@pytest.fixture
def here() -> Callable[..., Here]:
    """Makes what carries out tasks in this process."""
    return Here


@pytest.fixture
def prepared(tmp_path: Path, small: None) -> Callable[..., Outcome]:
    """Prepares points, a list or lists by split, through stages: names, or names with settings."""

    def run(
        points: Sequence[Any] | Mapping[str, Sequence[Any]],
        *stages: str | tuple[str, Mapping[str, Any]],
        engine: Any = None,
        folder: Path | None = None,
        seed: int = 0,
        keep_dropped: bool = False,
    ) -> Outcome:
        chosen = [(one, {}) if isinstance(one, str) else one for one in stages]
        settings = {name: {"name": name, **of} for name, of in chosen}
        of = points if isinstance(points, Mapping) else {"train": points}
        shown = [{"stage": name, "offer": name, "settings": dict(given), "fingerprint": ""} for name, given in chosen]
        data = {"name": "points", "points": {split: list(given) for split, given in of.items()}}
        one = Job(data, settings, seed, "", keep_dropped, json.dumps(data["points"]), [], shown, {})
        place = folder or tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
        place.mkdir(exist_ok=True)
        (place / "job.json").write_text(json.dumps(asdict(one)))
        files, manifest = Flow(Work(place, one), Phases(place, engine or Here(), lambda *_: None)).run()
        return Outcome(manifest, {file["name"]: (place / file["place"] / file["name"]).read_bytes() for file in files})

    return run
