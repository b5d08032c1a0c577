"""Predicted against measured memory, on real runs of a few steps: `python benchmarks/memory.py --help`.

Measured is the most that c10's CPU allocator had given out at once, on rank 0; predicted the peak of the rehearsal.
What was measured already is not measured again, so the command may be stopped at any time. Exit code 1 where a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from memory_cases import CASES, Case, write  # noqa: E402
from race import insert, processor  # noqa: E402

from runs.allocating import measure  # noqa: E402
from runs.allocations import built  # noqa: E402
from runs.foretelling import foretold  # noqa: E402
from runs.worlds import Worlds  # noqa: E402

PAGE, MARKERS = ROOT / "docs" / "planning-memory.md", "memory"
MEDIAN, WORST, LEAST = 0.01, 0.05, 30
"""The bars: relative errors, and of how many cases at least."""

LIBRARIES = ("loomtune", "torch", "transformers", "peft", "deepspeed")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """What was predicted and measured of a case, as `foretold` and `measure` say it."""

    case: Case
    predicted: dict[str, Any]
    measured: dict[str, Any]

    @property
    def error(self) -> float:
        """Of the predicted peak, relative to what was measured."""
        return float(self.predicted["peak"] / self.measured["ranks"][0]["peak"] - 1)

    @property
    def row(self) -> str:
        """Of the table."""
        case, ranks = self.case, self.measured["ranks"]
        mine, largest = ranks[0]["peak"] / MIB, max(rank["peak"] for rank in ranks) / MIB
        numbers = f"{mine:,.1f} | {largest:,.1f} | {self.predicted['peak'] / MIB:,.1f} | {self.error:+.2%}"
        rows = f"{case.rows} x {case.length}{', mixed' if case.mixed else ''}"
        settings = f"`{case.settings}`" if case.settings else ""
        return f"| {case.model} | {case.objective} | {settings} | {case.processes} | {rows} | {numbers} |"

    def moments(self) -> str:
        """Peaks of moments, in MiB, so that one sees where something is missing."""
        measured = {name: round(peak / MIB, 2) for name, peak in self.measured["ranks"][0]["peaks"].items()}
        predicted = {name: round(peak / MIB, 2) for name, peak in self.predicted["moments"].items()}
        causes = {name: round(size / MIB, 2) for name, size in self.predicted["causes"].items()}
        return f"   measured  {measured}\n   predicted {predicted}\n   of        {causes}"


class Bench:
    """Measures cases and foretells them. folder: for rows and runs; out: what is kept of what was measured."""

    def __init__(self, folder: Path, out: Path, *, again: bool = False, explain: bool = False) -> None:
        self.folder, self.out, self.again, self.explain = folder, out, again, explain
        self.worlds = Worlds(folder)
        os.environ["LOOMTUNE_CACHE"] = str(folder / "cache")  # a stored reference is read in each run
        built()
        write(folder)

    def line(self, case: Case) -> Line:
        """A case's."""
        return Line(case, foretold(case.overrides(self.folder), case.processes), self.measured(case))

    def measured(self, case: Case) -> dict[str, Any]:
        """What a real run of it took; from the files, if it was measured before."""
        path = self.out / f"{sha256(case.name.encode()).hexdigest()[:12]}.json"
        if self.again or not path.is_file():
            began, work = time.monotonic(), partial(measure, profiled=self.explain)
            with TemporaryDirectory(dir=self.folder) as folder:
                outcome = self.worlds.train(case.processes, case.overrides(self.folder), Path(folder) / "run", work)
            said = {"case": case.name, "seconds": time.monotonic() - began, "ranks": outcome.result["ranks"]}
            path.write_text(json.dumps(said, indent=1) + "\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def table(lines: Sequence[Line]) -> str:
    """All of it as Markdown."""
    errors = [abs(line.error) for line in lines]
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    said = [
        f"{date.today().isoformat()}, {processor()}, {versions}.",
        "",
        f"{len(lines)} cases: median error {median(errors):.2%} (the bar: {MEDIAN:.0%}), worst {max(errors):.2%} "
        f"({WORST:.0%}).",
        "",
        "| model | objective | settings | ranks | rows | measured on rank 0, MiB | largest | predicted | error |",
        "|---|---|---|---:|---|---:|---:|---:|---:|",
        *(line.row for line in lines),
    ]
    return "\n".join(said)


def reached(lines: Sequence[Line]) -> bool:
    """Whether the bars are."""
    errors = [abs(line.error) for line in lines]
    return len(lines) >= LEAST and median(errors) <= MEDIAN and max(errors) <= WORST


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this; no bar is looked at")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "memory", help="folder of what was measured")
    parser.add_argument("--again", action="store_true", help="measure anew")
    parser.add_argument("--explain", action="store_true", help="print moments and, with --again, what asked for memory")
    parser.add_argument("--write", action="store_true", help=f"renew the table in {PAGE.relative_to(ROOT)}")
    return parser.parse_args(given)


def main() -> int:
    asked = arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), asked.out, again=asked.again, explain=asked.explain)
        try:
            for case in (case for case in CASES if asked.only in case.name):
                lines.append(bench.line(case))
                print(lines[-1].row, flush=True)
                if asked.explain:
                    print(explained(lines[-1]), flush=True)
        finally:
            bench.worlds.stop()
    print(table(lines))
    if asked.write and not asked.only:
        insert(PAGE, table(lines), MARKERS)
    return 0 if asked.only or reached(lines) else 1


def explained(line: Line) -> str:
    """Moments, and what rank 0 held at its peak and at the end."""
    said = [line.moments()]
    for what in ("held", "left"):
        said.append(f"   {what}:")
        said += [f"   {size / MIB:10.3f} {count:5d} {where}" for size, count, where in line.measured["ranks"][0][what]]
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(main())
