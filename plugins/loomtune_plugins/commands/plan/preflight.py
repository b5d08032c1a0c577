"""Before a run is launched: whether it fits what it is for. Imports no torch: a child rehearses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loomtune import __version__, hookimpl
from loomtune.plan import Estimate, Finding, Plan

FILE = "plan.json"
"""In the run's folder: what was foreseen of it, as `loomtune plan --json` prints it."""

PATIENCE = 900.0
"""Seconds after which a run starts without having been foreseen."""

REMEDIES = 120.0
"""Seconds for which changes are looked for that would make a run fit."""


@hookimpl
def foresee(plan: Plan, folder: Path) -> Sequence[Finding]:
    """Refuses what will not fit the hardware that it names, and leaves what is foreseen in the run's folder."""
    if not (plan.root.hardware.known and plan.root.hardware.memory_gib and plan.processes):
        return []
    key = _key(plan)
    said = _kept(folder, key)
    if said is None:
        _tell("looking whether this run fits; hardware.kind='' leaves that out")
        said = {**_asked(plan, REMEDIES), "key": key}
    if (refused := said.get("refusal")) is not None:
        refuse = plan.root.hardware.refuse
        cure = refused["cure"] + ("; hardware.refuse=false starts it all the same" if refuse else "")
        found = [Finding(refused["what"], cure, fatal=refuse)]
    else:
        found = []
    if not any(one.fatal for one in found):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(said, indent=1) + "\n")
    return found


@hookimpl
def estimate(plan: Plan) -> Sequence[Estimate]:
    """Memory, time and cost, where hardware is named."""
    if not (plan.root.hardware.known and plan.processes):
        return []
    said = _asked(plan, 0.0)
    return [Estimate(*one) for one in said["estimates"]]


def _asked(plan: Plan, remedies: float) -> dict[str, Any]:
    """The child's answer. Raises RuntimeError where there is none."""
    asked = {"plan": plan.dump(), "per_node": _per_node(plan), "remedies": remedies}
    command = [sys.executable, "-m", "loomtune_plugins.commands.plan.child"]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, input=json.dumps(asked), capture_output=True, text=True, env=environment, timeout=PATIENCE
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _per_node(plan: Plan) -> int:
    """Processes of a node: as torchrun says where ranks were started by hand, as the launcher does, or one a device."""
    procs = plan.chosen("launcher").get("procs", "auto")
    by_hand = os.environ.get("LOCAL_WORLD_SIZE", "")
    if by_hand.isdigit():
        return int(by_hand)
    return procs if isinstance(procs, int) else plan.root.hardware.per_node


def _key(plan: Plan) -> str:
    """Of everything that what is foreseen depends on."""
    text = json.dumps([plan.settings, plan.processes, _per_node(plan), __version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept(folder: Path, key: str) -> Mapping[str, Any] | None:
    """What was foreseen at an earlier start of the very same."""
    try:
        said: dict[str, Any] = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    return said if said.get("key") == key else None


def _tell(line: str) -> None:
    print(f"loomtune: {line}", file=sys.stderr, flush=True)
