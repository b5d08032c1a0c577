"""How each contender is started: a process of its own, with one thread, that leaves its marks in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import clock
from job import Job

from loomtune import api

HERE = Path(__file__).resolve().parent
LOOMTUNE, BARE, TRL, PACKED = "loomtune", "bare loop", "TRL as it comes", "TRL with packing"
PLUGIN = "plugin"
Marks = list[dict[str, float]]


class Contenders:
    """Starts them on one job. folder: for what they leave."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.path = os.pathsep.join([str(folder / PLUGIN), str(HERE)])
        self.runs = 0

    def run(self, name: str) -> Marks:
        """One round of one contender. Raises RuntimeError with its last words where it fails."""
        self.runs += 1
        out, log = self.folder / f"marks-{self.runs}.json", self.folder / f"log-{self.runs}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", clock.OUT: str(out), "PYTHONPATH": self.path}
        with log.open("w") as words:
            done = subprocess.run(
                self._command(name), env=environment, stdout=words, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
        marks: Marks = json.loads(out.read_text())
        return marks

    def _command(self, name: str) -> list[str]:
        job = str(self.folder / "job.json")
        commands = {
            BARE: [str(HERE / "with_bare.py"), job],
            TRL: [str(HERE / "with_trl.py"), job],
            PACKED: [str(HERE / "with_trl.py"), job, "packing"],
        }
        return [sys.executable, *(commands[name] if name in commands else ["-m", "loomtune.worker", self._prepared()])]

    def _prepared(self) -> str:
        """A run's folder, as `loomtune train` leaves it to the processes that it starts."""
        plan = api.compose(self._overrides())
        api.check(plan)
        return str(api.prepare(plan))

    def _overrides(self) -> list[str]:
        job = self.job
        settings: dict[str, Any] = {
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
        return [f"{key}={value}" for key, value in settings.items()]


def announce(folder: Path) -> None:
    """Tells Python of the clock's plugin, as an installed distribution would; before loomtune looks for plugins."""
    about = folder / PLUGIN / "loomtune_benchmark-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: loomtune-benchmark\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[loomtune]\nbenchmark_clock = clock_plugin\n")
    sys.path.insert(0, str(about.parent))
