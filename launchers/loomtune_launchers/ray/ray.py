"""A Ray cluster: one bundle of a placement group for each node, an agent in each, all followed from here."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from loomtune.contracts import JobSpec, JobStatus, Launcher, Resources, Submission
from loomtune.errors import RunFailed, UserError
from loomtune_launchers import jobs, starter, torchrun
from loomtune_launchers.asked import Asked, say
from loomtune_launchers.ray import group as ray_group
from loomtune_launchers.ray.group import SLACK, TICK, Group
from loomtune_launchers.ray.settings import RaySettings
from loomtune_launchers.watching import ranklogs

PLACEMENT = "ray.json"
"""What is asked of Ray, in the run's folder."""

STRATEGIES = ("STRICT_SPREAD", "SPREAD", "PACK")


class Ray(Launcher):
    """Runs in the foreground; nothing outlives it: Ray ends the actors of a driver that is gone."""

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings
        jobs.nodes(settings)
        jobs.processes_a_node(settings, 1)
        _bytes(settings.memory)
        if settings.strategy not in STRATEGIES:
            raise UserError.of(f"launcher.strategy={settings.strategy} is none", f"set one of {', '.join(STRATEGIES)}")
        jobs.check_counts(settings)
        for key, least in {"cpus": 1, "gpus": 0, "patience": 0, "requeues": 0}.items():
            jobs.number(key, getattr(settings, key), least)
        if settings.address.startswith("ray://"):
            said = f"launcher.address={settings.address} is a Ray client's, which may come back after its death"
            raise UserError.of(said, "start on a node of the cluster (`ray job submit -- loomtune train ...`)")

    def processes(self, many: bool) -> int:
        least, most = jobs.nodes(self.settings)
        procs = jobs.processes_a_node(self.settings, max(1, self.settings.gpus) if many else 1)
        return most * procs if least == most else 0

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings, nodes = self.settings, jobs.nodes(self.settings)
        procs = processes // nodes[1] or jobs.processes_a_node(settings, max(1, settings.gpus))
        return JobSpec(
            run=run,
            arguments=(str(run),),
            nodes=nodes,
            procs=procs,
            environment=jobs.threads(settings, procs, settings.cpus * procs),
            resources=Resources(gpus=settings.gpus, cpus=settings.cpus, memory=settings.memory),
            grace=settings.grace,
            restarts=settings.restarts,
            requeues=settings.requeues,
        )

    def render(self, spec: JobSpec) -> Submission:
        meetings = [torchrun.Meeting("FIRST:FREE-PORT", "ATTEMPT", i == 0, f"NODE-{i}") for i in range(spec.nodes[1])]
        given = spec.resources
        bundle = {"CPU": given.cpus * spec.procs, "GPU": given.gpus, "memory": _bytes(given.memory)}
        asked = {"bundle": {name: count for name, count in bundle.items() if count}, "strategy": self.settings.strategy}
        return Submission(
            commands=tuple(torchrun.command(spec, meeting) for meeting in meetings),
            files={jobs.FILE: jobs.text(spec), PLACEMENT: json.dumps(asked, indent=1) + "\n"},
            environment=dict(spec.environment),
        )

    def submit(self, spec: JobSpec) -> str:
        run, attempt = spec.run, ""
        run.mkdir(parents=True, exist_ok=True)
        for name, text in self.render(spec).files.items():
            (run / name).write_text(text)
        (run / jobs.CANCELLED).unlink(missing_ok=True)
        with ray_group.connected(self.settings.address), Asked((run / jobs.CANCELLED).exists) as asked:
            for left in range(spec.requeues, -1, -1):
                attempt = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
                try:
                    lost = self._attempt(spec, attempt, asked)
                finally:
                    self._note(run, attempt, over=True)
                if not left or asked.times or not (lost or _status(run) == "preempted"):
                    break
                why = "lost a node" if lost else "was asked to leave, not by us"
                say(f"the run {why}; it is placed anew, {left} times at most")
                (run / "result.json").unlink(missing_ok=True)
        _explain(run, lost, bool(asked.times))
        return attempt

    def _attempt(self, spec: JobSpec, attempt: str, asked: Asked) -> list[str]:
        """One start, to its end; gives the nodes that were lost."""
        self._note(spec.run, attempt, state="pending")
        plan = {**json.loads((spec.run / PLACEMENT).read_text()), "name": f"{spec.name}-{attempt}-{os.getpid()}"}
        with ray_group.placed(spec, plan, self.settings.patience, asked) as (placement, count):
            self._note(spec.run, attempt, group=plan["name"])
            group = Group(spec, placement, count, asked)
            group.meet(attempt)
            group.follow()
            return group.lost

    def _note(self, run: Path, attempt: str, **said: Any) -> None:
        jobs.note(run, "ray", attempt=attempt, **starter.known(), address=self.settings.address, **said)

    def status(self, run: Path) -> JobStatus:
        record, ended = jobs.noted(run, "ray"), jobs.ended(run)
        if ended is not None and ended.state in ("completed", "stopped"):
            return ended
        if _goes_on(record):
            return JobStatus(record.get("state", "running"), starter.where(record))
        return starter.left(run, record, "failed")

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        record = jobs.noted(run, "ray")
        return ranklogs.merged(run, follow, lambda: not _goes_on(record))

    def cancel(self, run: Path) -> None:
        """The launcher sees the mark, wherever it was left, and ends the run; if it does not, it is ended with it."""
        record = jobs.noted(run, "ray")
        (run / jobs.CANCELLED).touch()
        until = time.monotonic() + self.settings.grace + 2 * SLACK
        while (goes_on := _goes_on(jobs.noted(run, "ray"))) and time.monotonic() < until:
            time.sleep(TICK)
        if goes_on and starter.here(record):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(record["pid"]).kill()
        elif goes_on:
            with ray_group.connected(record["address"]):
                ray_group.remove(jobs.noted(run, "ray").get("group", "none"))


def _goes_on(record: dict[str, Any]) -> bool:
    """Whether the launcher of a record is still there; on another machine, whether Ray has its group."""
    if record.get("over"):
        return False
    if starter.here(record):
        return starter.lives(record)
    if "group" not in record:
        return True
    with ray_group.connected(record["address"]):
        return ray_group.there(record["group"])


def _bytes(memory: str) -> int:
    """`64G` as Ray counts it. Raises UserError where it is none."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", memory.upper().removesuffix("B").removesuffix("I"))
    if memory and not found:
        raise UserError.of(f"launcher.memory={memory} is no memory", "set launcher.memory=64G, say")
    return int(found[1]) * 1024 ** " KMGT".index(found[2] or " ") if found else 0


def _status(run: Path) -> str:
    return ended.state if (ended := jobs.ended(run)) else ""


def _explain(run: Path, lost: list[str], asked: bool) -> None:
    """What the ranks say after a node was lost is a consequence. Raises RunFailed where none of them could say more."""
    path = run / "result.json"
    if not lost or asked:
        return
    if not path.is_file():
        raise RunFailed(f"{'; '.join(lost)}; what was committed is in {run / 'checkpoints'}")
    said = json.loads(path.read_text())
    if said["status"] == "failed":
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**said, "error": f"{'; '.join(lost)}; after it: {said['error']}"}, indent=1) + "\n")
        new.replace(path)
