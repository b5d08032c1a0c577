"""A pass: what the link before it dropped is left out, stages judge each row, the next link describes what stays."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Dropped, LinkStage, Row, RowStage, SplitStage
from loomtune.contracts.data import identity
from loomtune_plugins.commands.prepare.counts import Counts
from loomtune_plugins.commands.prepare.deciding import SPLITS, Verdict, verdicts
from loomtune_plugins.commands.prepare.equality import equals
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.judging import asked, judged
from loomtune_plugins.commands.prepare.parts import STATS, Generation, Lines

BATCH = 256
"""Rows that stages are asked about at a time; fixed, so that what models make of a batch is the same everywhere."""

DROPPED = "dropped.jsonl"


def refine(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One part of a pass."""
    number, part = task["pass"], task["part"]
    generation = Generation.of(work.folder / f"rows-{number}")
    given = _Given(work, number, part, generation)
    made = _Made(work, number, folder, generation.parts[part]["split"])
    lines = generation.lines(part)
    places = iter(range(*generation.range(part)))
    while batch := list(itertools.islice(lines, BATCH)):
        made.add(*given.kept(list(itertools.islice(places, BATCH)), batch, made))
    made.close(task["buckets"])


class Refused:
    """Where dropped rows are kept, if anywhere."""

    def __init__(self, folder: Path | None) -> None:
        self._file = (folder / DROPPED).open("w", encoding="utf-8") if folder else None

    def add(self, stage: str, one: Dropped) -> None:
        """Keeps one, with everything that is known of it."""
        if self._file:
            told = {"origin": one.origin, "stage": stage or "read", "reason": one.reason, "detail": one.detail}
            self._file.write(json.dumps({**told, "row": dict(one.row)}, default=repr) + "\n")

    def close(self) -> None:
        """Ends the file."""
        if self._file:
            self._file.close()


class _Given:
    """What the link before this pass decided about a part's rows."""

    def __init__(self, work: Work, number: int, part: int, generation: Generation) -> None:
        self._before = work.passes[number - 1].link if number else None
        self._verdicts = verdicts(work, number - 1, part) if number else ()
        self._base, self._generation = generation.range(part)[0], generation

    def kept(self, places: list[int], lines: list[bytes], made: _Made) -> tuple[list[bytes], list[str]]:
        """(lines that stay, the split of each, or nothing); the others are told to what is made."""
        if self._before is None:
            return lines, []
        stay, splits = [], []
        made.counts.passed(self._before, len(lines))
        for place, line in zip(places, lines, strict=True):
            verdict: Verdict = self._verdicts[place - self._base]
            if verdict.reason:
                made.drop(self._before, *self._told(json.loads(line), verdict))
            else:
                stay.append(line)
                splits.append(verdict.split)
        return stay, splits

    def _told(self, row: Row, verdict: Verdict) -> tuple[Dropped, Row]:
        other = self._generation.row(verdict.like)
        alike = "" if verdict.alike is None else f" ({verdict.alike:.4f})"
        detail = f"{other.get('origin', f'row {verdict.like + 1}')}{alike}"
        return Dropped(row.get("origin", ""), verdict.reason, detail, row), other


class _Made:
    """What a pass makes of a part."""

    def __init__(self, work: Work, number: int, folder: Path, split: str) -> None:
        self._stages = [(name, work.stages[name]) for name in work.passes[number].rows]
        self._link = work.link(number) if work.passes[number].link else None
        self._name, self._folder, self._split, self._seed = work.passes[number].link or "", folder, split, work.job.seed
        self.counts, self._refused = Counts(), Refused(folder if work.job.keep_dropped else None)
        names = ["rows"] if self._link else [f"rows-{split}" for split in SPLITS]
        self._lines = {name: Lines(folder, name) for name in names}
        self._described: list[NDArray[Any]] = []
        self._digests: list[bytes] = []

    def drop(self, stage: str, one: Dropped, other: Row | None = None) -> None:
        """Counts what goes no further. other: the row that stays in its stead."""
        self.counts.dropped(stage, one, other)
        self._refused.add(stage, one)

    def add(self, lines: list[bytes], splits: list[str]) -> None:
        """Takes some rows through the stages. splits: of each, where a link drew it."""
        if not lines:
            return
        for name, stage in self._stages:
            assert isinstance(stage, RowStage)
            self.counts.passed(name, len(lines))
            lines, splits = self._judged(name, stage, lines, splits)
        if self._link:
            self._lines["rows"].add(lines)
            self._describe(self._link, lines)
            return
        for line, split in zip(lines, splits or [""] * len(lines), strict=True):
            self._lines[f"rows-{split or self._split}"].add([line])

    def _judged(
        self, name: str, stage: RowStage, lines: list[bytes], splits: list[str]
    ) -> tuple[list[bytes], list[str]]:
        stay, where = list[bytes](), list[str]()
        for before, (answer, line), split in itertools.zip_longest(lines, judged(name, stage, lines), splits):
            if isinstance(answer, Dropped):
                self.drop(name, answer)
                self.counts.held(name, self._split, "dropped")
                continue
            if line != before:
                self.counts.changed(name, json.loads(before), answer)
                self.counts.held(name, self._split, "changed")
            stay.append(line)
            where += [split] if splits else []
        return stay, where

    def _describe(self, link: LinkStage, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        rows: list[Row] = [json.loads(line) for line in lines]
        if isinstance(link, SplitStage):
            key = str(self._seed).encode()
            self._digests += [hashlib.blake2b(identity(row), digest_size=8, key=key).digest() for row in rows]
        self._described.append(np.asarray(asked(self._name, lines, link.describe, rows)))

    def close(self, buckets: int) -> None:
        """Writes what is not written yet, and what is told of it."""
        for lines in self._lines.values():
            lines.close()
        self._refused.close()
        if self._described:
            described = np.concatenate(self._described)
            np.save(self._folder / "described.npy", described)
            equals(self._folder, described, buckets)
        if self._digests:
            np.save(self._folder / "digests.npy", np.frombuffer(b"".join(self._digests), "<u8"))
        sizes = {name: [len(lines), lines.size] for name, lines in self._lines.items()}
        told = {"rows": sum(rows for rows, _ in sizes.values()), "files": sizes, "split": self._split}
        (self._folder / STATS).write_text(json.dumps({**told, "counts": self.counts.stages}))
