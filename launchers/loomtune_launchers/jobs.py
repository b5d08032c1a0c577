"""What every launcher keeps and reads: the job as a file, which job a run is, and how a run stands by its own files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loomtune.contracts import JobSpec, JobStatus, Resources
from loomtune.errors import UserError
from loomtune_launchers import torchrun
from loomtune_launchers.settings import GroupSettings, NodesSettings

FILE = "job.json"
"""The job, in the run's folder: what nodes read, so that no value ever passes through a shell."""

RECORD = "launcher.json"
"""Which job of which engine the run is."""

CANCELLED = "cancelled"
"""In the run's folder: it was asked to end, and nothing starts it again but a new start."""


def text(spec: JobSpec) -> str:
    """The job as JSON."""
    return json.dumps({**asdict(spec), "run": str(spec.run)}, indent=1) + "\n"


def read(said: str) -> JobSpec:
    """The job of a text that `text` gave."""
    plain = json.loads(said)
    plain |= {"run": Path(plain["run"]), "resources": Resources(**plain["resources"])}
    return JobSpec(**plain | {name: tuple(plain[name]) for name in ("arguments", "nodes")})


def note(run: Path, launcher: str, **said: Any) -> None:
    """Writes down which job a run is."""
    run.mkdir(parents=True, exist_ok=True)
    new = run / f"{RECORD}.new"
    new.write_text(json.dumps({"launcher": launcher, **said}) + "\n")
    new.replace(run / RECORD)  # others look at any moment


def noted(run: Path, launcher: str) -> dict[str, Any]:
    """What was written down. Raises UserError where this launcher did not start the run."""
    path = run / RECORD
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("launcher") != launcher:
        raise UserError.of(f"{run} was not started by launcher={launcher}", "name the folder of a run that was")
    return found


def ended(run: Path) -> JobStatus | None:
    """How a run ended, by its `result.json`; None where there is none."""
    path = run / "result.json"
    if not path.is_file():
        return None
    said = json.loads(path.read_text())
    return JobStatus(said["status"], said["error"] or f"step {said['step']}")


def nodes(settings: NodesSettings) -> tuple[int, int]:
    """(least, most) of `launcher.nodes`. Raises UserError where it says neither a number nor `least:most`."""
    least, _, most = str(settings.nodes).partition(":")
    if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
        raise UserError.of(f"launcher.nodes={settings.nodes} is no number of nodes", "set launcher.nodes=2, or 1:4")
    return int(least), int(most or least)


def number(key: str, value: int, least: int = 0) -> int:
    """A setting that counts. Raises UserError where it is too small."""
    if value < least:
        raise UserError.of(f"launcher.{key}={value} is less than {least}", f"set launcher.{key}={max(least, 1)}")
    return value


def check_counts(settings: GroupSettings) -> None:
    """Raises UserError where a setting that every launcher has counts below nothing."""
    for key in ("threads", "restarts", "grace"):
        number(key, getattr(settings, key))


def processes_a_node(settings: GroupSettings, auto: int) -> int:
    """`launcher.procs`, where `auto` means what is given. Raises UserError where it is no number."""
    procs = settings.procs
    if procs == "auto":
        return auto
    if not isinstance(procs, int) or procs < 1:
        raise UserError.of(f"launcher.procs={procs} is no number of processes", "set launcher.procs=auto or 1, 2, ...")
    return procs


def check_environment(names: Iterable[str]) -> None:
    """Raises UserError for names of variables that are none, or that decide who meets whom."""
    for name in names:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            cure = "write launcher.environment={NAME: value}, with letters, digits and _ in the name"
            raise UserError.of(f"{name!r} is no name of a variable", cure)
        if name.startswith(torchrun.SCRUBBED) or name in torchrun.SCRUBBED_NAMES:
            cure = f"leave {name} out: launcher.nodes and launcher.procs say how many processes meet"
            raise UserError.of(f"launcher.environment sets {name}, which the job itself sets", cure)


def threads(settings: GroupSettings, processes: int, cores: int | None) -> dict[str, str]:
    """OMP_NUM_THREADS of a process, and what the settings add. cores: of a node, None where they are not known.

    Raises UserError where no process could be given what they add.
    """
    check_environment(settings.environment)
    if unfit := [name for name, value in settings.environment.items() if "\0" in value]:
        raise UserError.of(f"no process can be given the variable {unfit[0]}", "set it without NUL in a value")
    shared = max(1, cores // max(1, processes)) if cores else None
    number = settings.threads or os.environ.get("OMP_NUM_THREADS") or shared
    return {**({"OMP_NUM_THREADS": str(number)} if number else {}), **settings.environment}
