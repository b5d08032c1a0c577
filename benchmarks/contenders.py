"""How each contender is started: a process of its own, with one thread, that leaves its marks in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clock
from job import Job

from loomtune import api

HERE = Path(__file__).resolve().parent
LOOMTUNE, TRL = "loomtune", "TRL as it comes"
PLUGIN = "plugin"
Marks = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Contender:
    """Who takes part.

    script: a file of this folder, and its arguments after the job's; empty: loomtune, with settings of its own.
    """

    name: str
    script: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Contenders:
    """Starts them on one job. folder: for what they leave."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.path = os.pathsep.join([str(folder / PLUGIN), str(HERE)])
        self.runs = 0

    def run(self, contender: Contender) -> Marks:
        """One round of one contender. Raises RuntimeError with its last words where it fails."""
        self.runs += 1
        out, log = self.folder / f"marks-{self.runs}.json", self.folder / f"log-{self.runs}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", clock.OUT: str(out), "PYTHONPATH": self.path}
        command = [sys.executable, *self._command(contender)]
        with log.open("w") as words:
            done = subprocess.run(command, env=environment, stdout=words, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{contender.name} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
        marks: Marks = json.loads(out.read_text())
        return marks

    def _command(self, contender: Contender) -> list[str]:
        if contender.script:
            script, *arguments = contender.script
            return [str(HERE / script), str(self.folder / "job.json"), *arguments]
        return ["-m", "loomtune.worker", self._prepared(contender.settings)]

    def _prepared(self, settings: Mapping[str, Any]) -> str:
        """A run's folder, as `loomtune train` leaves it to the processes that it starts."""
        given = {**self._settings(), **settings}
        plan = api.compose([f"{key}={value}" for key, value in given.items()])
        api.check(plan)
        return str(api.prepare(plan))

    def _settings(self) -> dict[str, Any]:
        job = self.job
        return {
            "model.path": job.model,
            "data": "jsonl",
            "data.path": job.shuffled,
            "sharding": "single",
            "launcher.procs": 1,
            "steps": job.steps,
            "batch.size": job.batch,
            "max_length": job.max_length,
            "optimizer.lr": job.lr,
            "optimizer.weight_decay": 0,
            "optimizer.clip": job.clip,
            "schedule": "constant",
            "tracker": "[jsonl]",
            "run.dir": self.folder / f"run-{self.runs}",
        }


def announce(folder: Path) -> None:
    """Tells Python of the clock's plugin, as an installed distribution would; before loomtune looks for plugins."""
    about = folder / PLUGIN / "loomtune_benchmark-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: loomtune-benchmark\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[loomtune]\nbenchmark_clock = clock_plugin\n")
    sys.path.insert(0, str(about.parent))
