"""Chains of runs on the embedded task, one a seed, and the page that says what came of them.

Each seed has runs of its own: the default recipe, and what begins from it, every one a `loomtune train`. What is there
already is not run again, so a command may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from race import insert, processor

from loomtune import api
from loomtune.plan import Plan

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of the chain: its settings as typed, and the stage or folder whose model it starts from.

    teacher: the stage whose model it learns from. accuracy: whether it executes what its model writes.
    """

    name: str
    settings: str
    start: str = ""
    teacher: str = ""
    accuracy: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A stage with a seed, which decides on the questions of all splits and on the order of training."""

    stage: Stage
    seed: int
    asked: argparse.Namespace

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self._of(f"{self.stage.name}-{self.seed}")

    def plan(self) -> Plan:
        """Raises LoomtuneError where the run would be refused, for instance because its start has not been run."""
        stage, count = self.stage, self.asked.questions
        size = [f"data.seed={self.seed}", "data.validation=500", f"data.test={count}", "evaluate.before=false"]
        typed = ["sharding=single", "tracker=[jsonl]", f"seed={self.seed}", *size, *stage.settings.split()]
        if stage.accuracy:
            typed += [f"evaluator.sql_accuracy.rows={count}"]
        if stage.start:
            typed += [f"model.path='{self._model(stage.start)}'"]
        if stage.teacher:
            typed += [f"roles.teacher.model.path='{self._model(stage.teacher)}'"]
        return api.compose(typed)

    def _of(self, name: str) -> Path:
        out: Path = self.asked.out
        return out / name

    def _model(self, start: str) -> Path:
        """A folder of that name that is no stage's, or the stage's of this seed."""
        return self._of(start) if (self._of(start) / "config.json").is_file() else self._of(f"{start}-{self.seed}")

    def result(self) -> dict[str, float] | None:
        """The metrics at its end, and the minutes of its steps.

        None where it has not come there, or where its settings were others.
        """
        if not (self.folder / "result.json").is_file() or not agree(Plan.load(self.folder).maths, self.plan().maths):
            return None
        found = api.Result.of(self.folder)
        if found.status != "completed":
            return None
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        seconds = sum(json.loads(line).get("seconds", 0.0) for line in lines)
        return {**found.metrics, "minutes": seconds / 60}

    def run(self) -> str:
        """Runs it, on from its last checkpoint; gives what is to be said of it."""
        if self.result() is None:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            typed = [*self.plan().overrides, "launcher.procs=1", f"run.dir='{self.folder}'"]
            with self.folder.with_suffix(".log").open("ab") as log:
                subprocess.run(
                    [sys.executable, "-m", "loomtune.cli", "train", *typed], stdout=log, stderr=log, check=False
                )
        found = self.result()
        if found is None:
            return f"{self.folder.name} did not come to its end: {self.folder.with_suffix('.log')}"
        shown = {name: value for name, value in found.items() if name.startswith(("sql_", "heldout_"))}
        return f"{self.folder.name}: " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


def agree(before: Any, now: Any) -> bool:
    """Whether settings are the same, as far as both know them: one that came later says nothing of an earlier run."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(agree(before[key], now[key]) for key in before.keys() & now.keys())
    return bool(before == now)


Cell = Callable[[dict[str, dict[str, float]]], float | None]
"""From the metrics of a seed's stages, by their names, to a number of its row; None where it was not run."""


def of(stage: str, metric: str) -> Cell:
    return lambda found: found.get(stage, {}).get(metric)


Table = tuple[str, str, Mapping[str, Cell]]
"""Title, what is said beneath it, and its columns."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What is run of each seed, and the page with its tables.

    said: begins what is written, with `{today}`, `{versions}`, `{processor}` and `{questions}` in it.
    """

    stages: Sequence[Stage]
    tables: Sequence[Table]
    said: str
    page: Path
    markers: str

    def run(self, seed: int, asked: argparse.Namespace) -> None:
        """A seed's runs, one after the other, each after the one that it starts from."""
        for stage in self.stages:
            if asked.only in stage.name:
                print(Job(stage, seed, asked).run(), flush=True)

    def written(self, asked: argparse.Namespace) -> Iterator[str]:
        """Each table with what there is, seed by seed, and a mean where no seed lacks the number."""
        found = {
            seed: {stage.name: done for stage in self.stages if (done := Job(stage, seed, asked).result()) is not None}
            for seed in asked.seeds
        }
        for title, said, columns in self.tables:
            rows = {str(seed): [of(found[seed]) for of in columns.values()] for seed in asked.seeds}
            whole = (list(column) for column in zip(*rows.values(), strict=True))
            rows["mean"] = [None if None in column else mean(map(float, column)) for column in whole]
            table = [["seed", *map(str.strip, columns)], ["---"] * (len(columns) + 1)]
            table += [[name, *map(shown, columns, row)] for name, row in rows.items()]
            lines = "".join("| " + " | ".join(cells) + " |\n" for cells in table)
            yield f"### {title}\n\n{said}\n\n{lines}"

    def text(self, asked: argparse.Namespace) -> str:
        """The tables, with how they came about."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("loomtune", "torch", "transformers"))
        given = {"today": time.strftime("%Y-%m-%d"), "versions": versions, "processor": processor()}
        return "\n".join([self.said.format(**vars(asked), **given), *self.written(asked)])

    def arguments(self, doc: str, name: str) -> argparse.Namespace:
        """What was typed. name: of the runs' folder."""
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--only", default="", help="only stages whose name contains this")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--questions", type=int, default=1000, help="test questions")
        parser.add_argument("--at-once", type=int, default=2, help="seeds at the same time, one core each")
        parser.add_argument("--out", type=Path, default=ROOT / "runs" / name, help="folder of the runs")
        parser.add_argument("--write", action="store_true", help=f"put the tables into {self.page.relative_to(ROOT)}")
        asked = parser.parse_args()
        asked.out = asked.out.absolute()
        return asked

    def follow(self, asked: argparse.Namespace) -> None:
        """Runs what is missing, prints the tables, and writes them where that is asked for."""
        os.environ["OMP_NUM_THREADS"] = "1"
        with ThreadPoolExecutor(asked.at_once) as pool:
            list(pool.map(lambda seed: self.run(seed, asked), asked.seeds))
        said = self.text(asked)
        print(f"\n{said}")
        if asked.write:
            insert(self.page, said, self.markers)


def shown(column: str, value: float | None) -> str:
    """A number of a column."""
    if value is None:
        return "not run"
    if column.strip() == "minutes":
        return f"{value:.1f}"
    return f"{value:.4f}" if column.strip() == "loss" else f"{value:.1%}"
