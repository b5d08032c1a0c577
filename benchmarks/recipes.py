"""What the recipes of large models will take, by `loomtune plan`: `python benchmarks/recipes.py --help`.

Each recipe is planned for the world and the devices of its documented command, and the page gets a line of it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from race import insert

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
HARDWARE = "h100_80gb"
MARKERS = "planned"

HEAD = (
    "recipe",
    "GPUs",
    "state",
    "gathered",
    "activations, logits",
    "peak",
    "step, s",
    "tokens/s",
    "`mfu`",
    "host of a node",
)


def worlds() -> dict[str, tuple[int, int]]:
    """Recipe to (nodes, processes on each) of its command in the page."""
    text = PAGE.read_text().replace("\\\n", " ")
    found = {}
    for line in re.findall(r"^torchrun .*$", text, re.MULTILINE):
        nodes, procs, recipe = (
            re.search(rf"{flag}[ =](\S+)", line) for flag in ("--nnodes", "--nproc-per-node", " recipe")
        )
        assert nodes and procs and recipe, line
        found[recipe[1]] = (int(nodes[1]), int(procs[1]))
    return found


def planned(recipe: str, world: tuple[int, int], hardware: str) -> dict[str, Any]:
    """What `loomtune plan --json` says; it ends with 1 where the run does not fit."""
    typed = [f"recipe={recipe}", "data.path=rows.jsonl", f"hardware={hardware}"]
    typed += [f"launcher.nodes={world[0]}", f"launcher.procs={world[1]}"]
    command = [sys.executable, "-m", "loomtune.cli", "plan", "--json", *typed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{recipe}: {done.stderr}")
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def line(recipe: str, said: Mapping[str, Any]) -> list[str]:
    """A recipe's row of the table; memory in GiB."""
    causes, memory, times = said["memory"]["causes_bytes"], said["memory"], said["time"]

    def gib(*names: str) -> str:
        return f"{sum(causes.get(name, 0) for name in names) / 2**30:.1f}"

    peak = f"{memory['peak_bytes'] / 2**30:.1f}"
    host = memory["host_bytes_per_node"]
    return [
        f"`{recipe}`",
        str(said["world"]["processes"]),
        gib("parameters", "gradients", "optimizer", "roles"),
        gib("gathered"),
        gib("activations", "logits", "temporary", "rollout", "overhead"),
        peak if said["fits"] else f"**{peak}**",
        _span(times["step_seconds"], ".1f"),
        _span(times["tokens_per_second"], ",.0f"),
        _span([100 * share for share in said["compute"]["mfu"]], ".0f") + " %",
        "" if host is None else f"{host / 2**30:.0f}",
    ]


def _span(values: Sequence[float], form: str) -> str:
    return " to ".join(format(value, form) for value in values)


def written(found: Mapping[str, Mapping[str, Any]], hardware: str) -> Iterator[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("loomtune", "torch", "transformers"))
    title = next(iter(found.values()))["hardware"]["title"]
    yield (
        f"Written by `make recipes` on {time.strftime('%Y-%m-%d')}: {versions}; `hardware={hardware}` ({title}). "
        "Foretold, not measured. GiB of rank 0 at its peak, what does not fit in bold; every row `max_length` long; "
        "seconds, tokens/s of all ranks and MFU as ranges.\n"
    )
    yield "| " + " | ".join(HEAD) + " |"
    yield "|---" * len(HEAD) + "|"
    for recipe, said in found.items():
        yield "| " + " | ".join(line(recipe, said)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only recipes whose name contains this")
    parser.add_argument("--hardware", default=HARDWARE, help="what they are planned for")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    found = {}
    for recipe, world in worlds().items():
        if asked.only in recipe:
            found[recipe] = planned(recipe, world, asked.hardware)
            print(" | ".join(line(recipe, found[recipe])), flush=True)
    text = "\n".join(written(found, asked.hardware))
    if asked.write:
        insert(PAGE, text, MARKERS)


if __name__ == "__main__":
    main()
