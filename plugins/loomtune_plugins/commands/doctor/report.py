"""The answer: `doctor.json`, and the `result.json` that launchers look for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_high
from typing import Any

from loomtune_plugins.commands.doctor.cluster import cluster, lost, offsets, scores
from loomtune_plugins.commands.doctor.findings import FAULT, Answers, Finding
from loomtune_plugins.commands.doctor.machines import cores, machines

FILE = "doctor.json"
FORMAT = 1


def made(
    answers: Answers, troubles: Sequence[Mapping[str, Any]], *, size: int, expected: Mapping[str, int]
) -> dict[str, Any]:
    """The answer as plain data. size: ranks that were started. expected: `nodes` and `procs` that were asked for."""
    found = [*lost(answers, troubles, expected), *machines(answers), *cluster(answers)]
    return concluded(
        {
            "format": FORMAT,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "quick": answers.quick,
            "size": size,
            "nodes": _nodes(answers),
            "collectives": answers.said.get("collectives", {}).get(0, []),
            "pairs": [line for lines in answers.said.get("pairs", {}).values() for line in lines],
            "said": answers.said,
        },
        found,
    )


def concluded(said: dict[str, Any], found: Sequence[Finding]) -> dict[str, Any]:
    """With further findings, faults first, and the verdict."""
    findings = [*map(asdict, found), *said.get("findings", ())]
    findings.sort(key=lambda finding: finding["level"] != FAULT)
    return {**said, "findings": findings, "sound": all(one["level"] != FAULT for one in findings)}


def write(said: Mapping[str, Any], folder: Path) -> None:
    """The answer as a file, complete or not there."""
    _replace(folder / FILE, said)


def settle(said: Mapping[str, Any], folder: Path) -> None:
    """The result of the job, which is complete whatever was found."""
    faults = sum(one["level"] == FAULT for one in said["findings"])
    metrics = {"faults": faults, "warnings": len(said["findings"]) - faults}
    _replace(folder / "result.json", {"status": "completed", "step": 0, "metrics": metrics, "error": None})


def _replace(path: Path, said: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}")
    whole.write_text(json.dumps(said, indent=1) + "\n")
    whole.replace(path)


def _nodes(answers: Answers) -> dict[str, Any]:
    """What the table shows of each node."""
    facts, disks, graphics = (answers.of_nodes(phase) for phase in ("facts", "disks", "graphics"))
    ranked, ahead = answers.by_node("facts"), offsets(answers)
    bandwidths, latencies = scores(answers, "bandwidth", median_high), scores(answers, "latency", min)
    return {
        name: {
            "ranks": list(ranks),
            "cores": cores(ranked[name]) if name in ranked else None,
            "memory": facts.get(name, {}).get("memory"),
            "interface": facts.get(name, {}).get("interface"),
            "disks": disks.get(name),
            "gpus": graphics.get(name, {}).get("count"),
            "flops": _flops(answers, ranks),
            "clock": ahead.get(name),
            "bandwidth": bandwidths.get(name),
            "latency": latencies.get(name),
        }
        for name, ranks in answers.nodes.items()
    }


def _flops(answers: Answers, ranks: Sequence[int]) -> float | None:
    """Of the node's slowest GPU."""
    said = answers.said.get("graphics", {})
    return min((said[rank]["flops"] for rank in ranks if "flops" in said.get(rank, {})), default=None)
