"""`loomtune doctor`: the words, the start through a launcher, and what is printed. Imports no torch."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loomtune.catalogue import installed
from loomtune.contracts import JobSpec, Launcher
from loomtune.errors import LoomtuneError, UserError
from loomtune_plugins.commands.doctor import report
from loomtune_plugins.commands.doctor.findings import FAULT, Finding
from loomtune_plugins.commands.doctor.shown import shown
from loomtune_plugins.commands.doctor.waiting import PAUSE, Deadline, awaited, bounded, cancelled_with_us
from loomtune_plugins.commands.words import parser, read

MODULE = "loomtune_plugins.commands.doctor.rank"
SHARE = 0.7
"""Of the time, what ranks get from their own start on: the rest is for starting them."""

LAST_CALL = {"PET_RDZV_CONF": "last_call_timeout=60"}
"""How long torchrun's rendezvous waits for nodes once the first is there; then it begins with those that came."""

TAIL = 15


def doctor(words: Sequence[str]) -> int:
    """Prints the table, or the JSON. Gives 1 where there are faults."""
    options = _options(words)
    from loomtune import api

    plan = api.compose(options.overrides)
    launcher: Launcher = plan.build(installed(), "launcher")
    folder = _folder(plan.root.run.dir, options.out)
    spec = _examination(launcher, launcher.spec(folder, launcher.processes(many=True), plan.overrides), options)
    _made(folder)
    if launcher.elsewhere:
        return _elsewhere(launcher, spec, options)
    return _concluded(folder, _carried_out(launcher, spec, options), json_wanted=options.json)


def _made(folder: Path) -> None:
    """Raises UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (report.FILE, "result.json"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError.of(f"{folder} cannot be written to: {error}", "name another folder: run.dir or --out") from None


def _options(words: Sequence[str]) -> argparse.Namespace:
    asked = parser("doctor")
    asked.add_argument("--json", action="store_true", help="print doctor.json instead of the table")
    asked.add_argument("--quick", action="store_true", help="shorter measurements of fewer sizes")
    asked.add_argument("--out", metavar="DIR", help="the folder to examine and to leave doctor.json in; "
                       "default: doctor-<time> beside run.dir, or in runs/")  # fmt: skip
    asked.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds until it ends, whatever hangs")
    asked.add_argument("--wait", type=float, default=3600, metavar="S", help="seconds in a scheduler's queue before")
    options = read(asked, words)
    for name in ("timeout", "wait"):
        if not 1 <= (seconds := getattr(options, name)) <= threading.TIMEOUT_MAX:  # nan is neither
            raise UserError.of(f"--{name} {seconds:g} is no time", f"give seconds, such as --{name} 600")
    return options


def _folder(run: str | None, out: str | None) -> Path:
    """On the file system that the run will use. Raises UserError where there is a run."""
    kept = Path(run) if run else Path("runs/run")
    beside = kept if kept.is_mount() else kept.parent
    folder = (Path(out) if out else beside / f"doctor-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if folder.is_file() or (folder / "run.yaml").exists():
        raise UserError.of(f"--out {folder} is no folder for an examination", "name an empty or a new folder")
    return folder


def _examination(launcher: Launcher, spec: JobSpec, options: argparse.Namespace) -> JobSpec:
    """The job of the run, but with ranks that examine.

    Where the launcher itself starts the nodes' agents, torchrun may begin without those that do not come, so that ranks
    can say who is missing. Not where the engine would then be asked for fewer nodes, as schedulers are.
    """
    folder = next((word[8:].strip("'") for word in spec.arguments if word.startswith("run.dir=")), str(spec.run))
    words = ["launched", f"seconds={options.timeout * SHARE:.0f}", f"nodes={spec.nodes[1]}", f"procs={spec.procs}"]
    words += [*(["quick"] if options.quick else []), *([] if launcher.elsewhere else ["quiet"])]
    spec = replace(spec, module=MODULE, arguments=(folder, *words), name="doctor", restarts=0, requeues=0)
    fewer = replace(spec, nodes=(1, spec.nodes[1]), environment={**spec.environment, **LAST_CALL})
    same = spec.nodes[1] > 1 and launcher.render(fewer).commands == launcher.render(spec).commands
    return fewer if same and not launcher.elsewhere else spec


def _carried_out(launcher: Launcher, spec: JobSpec, options: argparse.Namespace) -> list[Finding]:
    """Starts it and waits for its end; what went wrong with that."""
    deadline, folder = Deadline(options.timeout, options.wait), spec.run
    late: list[Finding] = []
    try:
        if launcher.detached:
            launcher.submit(spec)
            return awaited(launcher, folder, deadline, (folder / report.FILE).is_file)
        leave = partial(_concluded, folder, late, json_wanted=options.json)
        with bounded(launcher, folder, deadline, late, leave), redirect_stdout(sys.stderr):  # not the answer
            launcher.submit(spec)
        return late
    except UserError as error:
        return [*late, *(Finding(FAULT, fault.what, fault.cure) for fault in error.faults)]
    except LoomtuneError as error:
        return [*late, Finding(FAULT, f"the launcher gave up: {error}", "start again when that is mended")]
    except OSError as error:
        return [*late, Finding(FAULT, f"{folder} cannot be written to: {error}", "make room, or name another by --out")]


def _concluded(folder: Path, found: Sequence[Finding], *, json_wanted: bool) -> int:
    """Prints the answer of the ranks, and what only the launching process knows."""
    said = _said(folder)
    if said is None:
        found = [*found, *_nobody(folder, explained=bool(found))]
    elif error := _error(folder):
        cure = f"look at what that rank said: {folder / 'logs'}"
        found = [*found, Finding(FAULT, f"the examination broke off: {error}", cure)]
    shutil.rmtree(folder / "seen", ignore_errors=True)  # of ranks that were killed
    said = report.concluded(said or {"nodes": {}, "size": 0}, found)
    with suppress(OSError):  # a full disk is among the findings
        report.write(said, folder)
    print(json.dumps(said, indent=1) if json_wanted else "\n".join(shown(said)), flush=True)
    print(f"loomtune doctor: {folder / report.FILE}", file=sys.stderr)
    return 0 if said["sound"] else 1


def _said(folder: Path) -> dict[str, Any] | None:
    """What rank 0 wrote; a network file system may show it late."""
    for _ in range(5):
        with suppress(FileNotFoundError):
            said: dict[str, Any] = json.loads((folder / report.FILE).read_text())
            return said
        time.sleep(PAUSE)
    return None


def _nobody(folder: Path, *, explained: bool) -> Iterator[Finding]:
    """No answer: the ranks' own error, if one was left, says most. explained: whether something else says why."""
    for line in _tail(folder):
        print(line, file=sys.stderr)
    error = f": {said}" if (said := _error(folder)) else ""
    if error or not explained:
        cure = "read the logs above; every node must import loomtune, see this folder, and reach the first node's port"
        yield Finding(FAULT, f"no rank gave an answer in {folder}{error}", cure)


def _error(folder: Path) -> str:
    """Why the job failed, as its result says; empty where it did not, or was only asked to end."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((folder / "result.json").read_text())["error"] or ""
    return ""


def _tail(folder: Path) -> Iterator[str]:
    """The last that ranks printed."""
    for path in sorted((folder / "logs").rglob("*.log"))[:8]:
        yield from path.read_text(errors="replace").splitlines()[-TAIL:]


def _elsewhere(launcher: Launcher, spec: JobSpec, options: argparse.Namespace) -> int:
    """Where this machine's files are not seen, rank 0 prints the table itself, and the logs bring it here."""
    late: list[Finding] = []
    with bounded(launcher, spec.run, Deadline(options.timeout, options.wait), late, lambda: 1):
        launcher.submit(spec)
        with cancelled_with_us(launcher, spec.run):
            for line in launcher.logs(spec.run, follow=True):
                print(line, flush=True)
    for finding in late:
        print(f"{finding.level}: {finding.what}\n    cure: {finding.cure}", file=sys.stderr)
    said = launcher.result(spec.run)
    return 1 if late or said is None or said["metrics"].get("faults", 1) else 0
