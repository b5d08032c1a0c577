"""Full SFT by loomtune, by TRL and by a loop written by hand, on the same rows: `python benchmarks/sft.py --help`.

Exit code 1 where a bar is missed. See docs/benchmarks.md for what is measured and why so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import material
from contenders import BARE, LOOMTUNE, PACKED, TRL, Contenders, Marks, announce
from verdict import Bar, Measured, bars, table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> int:
    chosen = arguments()
    names = [LOOMTUNE, BARE] if chosen.quick else [LOOMTUNE, TRL, BARE, PACKED]
    with tempfile.TemporaryDirectory(prefix="loomtune-bench-") as place:
        folder = Path(place)
        announce(folder)
        os.environ.setdefault("LOOMTUNE_CACHE", str(folder / "cache"))
        try:
            job = material.make(
                folder, steps=chosen.steps, batch=chosen.batch, max_length=chosen.max_length, quick=chosen.quick
            )
        except FileNotFoundError as error:
            print(f"nothing was measured: {error}")
            return 0
        rounds = race(Contenders(job, folder), names, chosen.rounds)
    measured = {name: Measured.of(rounds[name]) for name in names}
    judged = bars(measured)
    said = f"{table(measured, judged)}\n\n{circumstances(chosen)}"
    print(said)
    if chosen.json:
        keep(chosen.json, measured, judged, rounds)
    if chosen.write:
        insert(chosen.write, said)
    must = [bar for bar in judged if bar.spread is None] if chosen.quick else judged
    return 0 if all(bar.reached for bar in must) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a round; the first two are not timed")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs, in turn")
    parser.add_argument("--batch", type=int, default=8, help="examples per optimizer step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of the longest example")
    parser.add_argument("--quick", action="store_true", help="a tiny model, no TRL, no bar on time")
    parser.add_argument("--json", type=Path, help="file for every mark and the verdict")
    parser.add_argument("--write", type=Path, help="Markdown file between whose markers the table is put")
    return parser.parse_args()


def race(contenders: Contenders, names: list[str], rounds: int) -> dict[str, list[Marks]]:
    """Every contender once, then all of them again: whatever slows the machine meets them all."""
    found: dict[str, list[Marks]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            found[name].append(contenders.run(name))
            print(f"round {number + 1}: {name} done", file=sys.stderr, flush=True)
    return found


def circumstances(chosen: argparse.Namespace) -> str:
    """When, where and with what."""
    packages = ("loomtune", "torch", "transformers", *(() if chosen.quick else ("trl", "accelerate")))
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{time.strftime('%Y-%m-%d')}: {versions}; Python {platform.python_version()}; {processor()}, one thread each, "
        f"load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores; {chosen.rounds} rounds of {chosen.steps} steps of "
        f"{chosen.batch} examples."
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def keep(path: Path, measured: dict[str, Measured], judged: list[Bar], rounds: dict[str, list[Marks]]) -> None:
    content = {
        "measured": {name: asdict(one) for name, one in measured.items()},
        "bars": [{**asdict(bar), "reached": bar.reached} for bar in judged],
        "marks": rounds,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def insert(path: Path, said: str) -> None:
    """Replaces what stands between the markers."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
