"""The last phase: parts become files of bounded size, known by their digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loomtune.contracts import RowStage
from loomtune_plugins.commands.prepare.deciding import SPLITS
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.parts import STATS, Generation
from loomtune_plugins.commands.prepare.refining import DROPPED

FILE = 256 << 20
"""Bytes of one file, about."""

SHOWN = 200
"""Rows of a page."""

_BLOCK = 1 << 20


def write(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One file: a split's rows of some parts."""
    generation = Generation.of(work.folder / task["from"])
    own = f"rows-{task['split']}"
    parts = range(*task["parts"])
    _joined([generation.path(number) / f"{own}.jsonl" for number in parts], folder / task["name"])
    rows = sum(generation.parts[number]["files"][own][0] for number in parts)
    _tell(folder, task["name"], {"split": task["split"], "rows": rows})


def dropped(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One file of all rows that were dropped, in the order of passes."""
    paths = [path for name in task["from"] for path in sorted((work.folder / name).glob(f"*/{DROPPED}"), key=_order)]
    _joined(paths, folder / task["name"])
    _tell(folder, task["name"], {})


def page(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One file of what a stage shows of rows: of the first ones, those of the test split before all others."""
    stage, generation = work.stages[task["stage"]], Generation.of(work.folder / task["from"])
    assert isinstance(stage, RowStage)
    shown, rest = list[str](), 0
    for line in _lines(generation):
        if len(shown) == SHOWN:
            rest += 1
        elif told := stage.page(json.loads(line)):
            shown.append(told)
    more = [f"{rest:,} more rows say the same in their columns."] if rest else []
    text = "\n\n".join([f"# {task['stage']}", *shown, *more])
    (folder / task["name"]).write_text(f"{text}\n", encoding="utf-8")
    _tell(folder, task["name"], {"page": task["stage"]})


def _lines(generation: Generation) -> Iterator[bytes]:
    for split in SPLITS:
        for number in range(len(generation.parts)):
            with (generation.path(number) / f"rows-{split}.jsonl").open("rb") as file:
                yield from file


def pages(work: Work) -> list[str]:
    """The stages that show something of rows."""
    rows = {name: stage for name, stage in work.stages.items() if isinstance(stage, RowStage)}
    return [name for name, stage in rows.items() if type(stage).page is not RowStage.page]


def files(generation: Generation, split: str) -> list[tuple[int, int]]:
    """Which parts' rows of a split stand in which file: from a part on, and before which."""
    made, begin, size = list[tuple[int, int]](), 0, 0
    for number, part in enumerate(generation.parts):
        size += part["files"][f"rows-{split}"][1]
        if size >= FILE:
            made.append((begin, number + 1))
            begin, size = number + 1, 0
    return [*made, (begin, len(generation.parts))] if size else made


def _order(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.parent.name.split("-")))


def _joined(paths: list[Path], to: Path) -> None:
    with to.open("wb") as whole:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, whole, _BLOCK)


def _tell(folder: Path, name: str, told: dict[str, Any]) -> None:
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        known = {**told, "name": name, "bytes": file.tell(), "sha256": sha256}
    (folder / STATS).write_text(json.dumps(known))
