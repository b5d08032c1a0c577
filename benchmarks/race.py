"""A race: contenders that do the same job in turn, and what is said of them at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from contenders import Contender, Contenders, Marks, announce
from job import Job
from verdict import Bar, Measured, table

Rounds = dict[str, list[Marks]]


class Race(ABC):
    """What is raced for. chosen: the command line. says: the first line of its help."""

    says: str
    examples: str = "examples"
    steps: int = 8
    warm_up: int = 2
    """First steps of each round that are not timed."""
    markers: str = "measured"

    def __init__(self) -> None:
        self.chosen = self._arguments()

    @abstractmethod
    def contenders(self) -> Sequence[Contender]:
        """Who takes part, in turn."""

    @abstractmethod
    def job(self, folder: Path) -> Job:
        """Writes everything into a folder. Raises FileNotFoundError where data is not there."""

    @abstractmethod
    def bars(self, measured: Mapping[str, Measured]) -> list[Bar]:
        """All that can be said of these contenders."""

    def main(self) -> int:
        """Exit code 1 where a bar is missed."""
        chosen = self.chosen
        with tempfile.TemporaryDirectory(prefix="loomtune-bench-") as place:
            folder = Path(place)
            announce(folder)
            os.environ.setdefault("LOOMTUNE_CACHE", str(folder / "cache"))
            try:
                job = self.job(folder)
            except FileNotFoundError as error:
                print(f"nothing was measured: {error}")
                return 0
            rounds = self._run(Contenders(job, folder))
        measured = {name: Measured.of(marks, self.warm_up) for name, marks in rounds.items()}
        judged = self.bars(measured)
        said = f"{table(measured, judged, self.examples)}\n\n{self._circumstances()}"
        print(said)
        if chosen.json:
            keep(chosen.json, measured, judged, rounds)
        if chosen.write:
            insert(chosen.write, said, self.markers)
        must = [bar for bar in judged if bar.spread is None] if chosen.quick else judged
        return 0 if all(bar.reached for bar in must) else 1

    def _arguments(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.says)
        warm_up = f"optimizer steps of a round; the first {self.warm_up} are not timed"
        parser.add_argument("--steps", type=int, default=self.steps, help=warm_up)
        parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs, in turn")
        parser.add_argument("--batch", type=int, default=8, help=f"{self.examples} per optimizer step")
        parser.add_argument("--max-length", type=int, default=512, help="tokens of the longest row")
        parser.add_argument("--quick", action="store_true", help="a tiny model, no TRL, no bar on time")
        parser.add_argument("--json", type=Path, help="file for every mark and the verdict")
        parser.add_argument("--write", type=Path, help="Markdown file between whose markers the table is put")
        return parser.parse_args()

    def _run(self, contenders: Contenders) -> Rounds:
        """Every contender once, then all of them again: whatever slows the machine meets them all."""
        found: Rounds = {}
        for number in range(self.chosen.rounds):
            for contender in self.contenders():
                found.setdefault(contender.name, []).append(contenders.run(contender))
                print(f"round {number + 1}: {contender.name} done", file=sys.stderr, flush=True)
        return found

    def _circumstances(self) -> str:
        """When, where and with what."""
        chosen = self.chosen
        rival = any("trl" in part for contender in self.contenders() for part in contender.script)
        packages = ("loomtune", "torch", "transformers", *(("trl", "accelerate") if rival else ()))
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        return (
            f"{time.strftime('%Y-%m-%d')}: {versions}; Python {platform.python_version()}; {processor()}, one thread "
            f"each, load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores; {chosen.rounds} rounds of {chosen.steps} "
            f"steps of {chosen.batch} {self.examples}."
        )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def keep(path: Path, measured: Mapping[str, Measured], judged: Sequence[Bar], rounds: Rounds) -> None:
    content = {
        "measured": {name: asdict(one) for name, one in measured.items()},
        "bars": [{**asdict(bar), "reached": bar.reached} for bar in judged],
        "marks": rounds,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def insert(path: Path, said: str, markers: str) -> None:
    """Replaces what stands between the markers of a name, each of which stands there once."""
    begin, end = (f"<!-- {markers}: {which} -->" for which in ("begin", "end"))
    text = path.read_text()
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}\n{said.rstrip()}\n{end}{rest.split(end)[1]}")
