"""SkyPilot: a task for machines of a cloud, which it finds, starts and gives back."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from loomtune.contracts import JobSpec, JobStatus, Launcher, Submission
from loomtune.errors import Fault, UserError
from loomtune_launchers import elsewhere, jobs, there
from loomtune_launchers.skypilot.settings import SkyPilotSettings

FILE = "task.yaml"

RUN = """\
export PET_NNODES="$SKYPILOT_NUM_NODES" PET_NODE_RANK="$SKYPILOT_NODE_RANK" PET_NPROC_PER_NODE={procs}
export PET_MASTER_ADDR="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" PET_MASTER_PORT={port}
{meeting}exec {python} -m {module}
"""
"""What each machine runs. What users set is in `LOOMTUNE_PACKED`: nothing of it is here for a shell to read."""

MEETING = """\
export PET_RDZV_ENDPOINT="$PET_MASTER_ADDR:$PET_MASTER_PORT"
export PET_RDZV_CONF="is_host=$([ "$PET_NODE_RANK" = 0 ] && echo true || echo false)"
export PET_LOCAL_ADDR="$(echo "$SKYPILOT_NODE_IPS" | sed -n "$((PET_NODE_RANK + 1))p")"
"""
"""Where restarts meet: by addresses, for a cloud's machines may not know each other's names."""

STATES = {
    **dict.fromkeys(("INIT", "PENDING", "SETTING_UP", "SUBMITTED", "STARTING", "RECOVERING"), "pending"),
    **dict.fromkeys(("RUNNING", "WINDING_DOWN", "CANCELLING"), "running"),
    "SUCCEEDED": "completed",
    "CANCELLED": "cancelled",
}
"""SkyPilot's states; all others are ways to fail."""


SILENT = "Failed to get the job queue"
"""What `sky queue` prints of a cluster that it cannot ask, before an empty table."""

GONE = "ClusterDoesNotExist|status: STOPPED|has been stopped"
"""Why there is nothing to ask."""


class SkyPilot(Launcher):
    """Hands the run to a cloud that sees nothing of this machine but what is copied there."""

    detached = True
    elsewhere = True

    def __init__(self, settings: SkyPilotSettings) -> None:
        self.settings = settings
        if found := list(_faults(settings)):
            raise UserError(*found)
        jobs.processes_a_node(settings, 1)
        jobs.check_counts(settings)
        jobs.check_environment([*settings.environment, *settings.secrets])
        for key, least in {"nodes": 1, "disk_size": 0}.items():
            jobs.number(key, getattr(settings, key), least)
        self._folder(elsewhere.job_name(settings.job, Path("run")))

    def processes(self, many: bool) -> int:
        gpus = self.settings.accelerators.partition(":")[2]
        auto = int(gpus or 1) if many and self.settings.accelerators else 1
        return self.settings.nodes * jobs.processes_a_node(self.settings, auto)

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings = self.settings
        name = elsewhere.job_name(settings.job, run)
        return JobSpec(
            run=run,
            module=elsewhere.MODULE,
            arguments=elsewhere.arguments(typed, self._folder(name)),
            name=name,
            nodes=(settings.nodes, settings.nodes),
            procs=max(1, processes // settings.nodes),
            environment=elsewhere.environment(settings),
            grace=settings.grace,
            restarts=settings.restarts,
        )

    def render(self, spec: JobSpec) -> Submission:
        settings = self.settings
        secrets = [word for name in settings.secrets for word in ("--secret", name)]
        down = ["--down"] if settings.down else []
        single = ["sky", "launch", "--cluster", spec.name, *down]
        words = ["sky", "jobs", "launch", "--name", spec.name] if settings.managed else single
        command = (*words, "--yes", "--detach-run", *secrets, str(spec.run / FILE))
        return Submission(commands=(command,), files={FILE: _text(self._task(spec))})

    def submit(self, spec: JobSpec) -> str:
        submission = self.render(spec)
        record = {"job": spec.name, "managed": self.settings.managed, "down": self.settings.down}
        found = _found(record)
        if found and STATES.get(found["status"]) in ("pending", "running"):
            cure = f"wait for it, or end it: loomtune cancel {spec.run}; if it is another run's, set launcher.job="
            raise UserError.of(f"a job called {spec.name} goes on", cure)
        elsewhere.write(spec, submission)
        jobs.note(spec.run, "skypilot", **record)  # a launch that is broken off may have taken machines
        for command in submission.commands:
            elsewhere.show(command)
        return spec.name

    def status(self, run: Path) -> JobStatus:
        found = _found(jobs.noted(run, "skypilot"))
        if found is None:
            if (run / jobs.CANCELLED).exists():
                return JobStatus("cancelled")
            return JobStatus("unknown", "SkyPilot has no such job, or its machines are given back")
        state = STATES.get(found["status"], "failed")
        detail = found.get("failure_reason") or found["status"]
        if state in ("pending", "running", "cancelled"):
            return JobStatus(state, detail)
        return elsewhere.standing(self.result(run), state, detail)

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        yield from elsewhere.lines((*self._logs(run), *([] if follow else ["--no-follow"])))

    def cancel(self, run: Path) -> None:
        said = jobs.noted(run, "skypilot")
        (run / jobs.CANCELLED).touch()
        if said["managed"]:
            elsewhere.call(("sky", "jobs", "cancel", "--name", said["job"], "--yes"))
        elif said["down"]:  # its processes end with its machines
            elsewhere.call(("sky", "down", said["job"], "--yes"))
        else:
            elsewhere.call(("sky", "cancel", said["job"], "--all", "--yes"))

    def result(self, run: Path) -> dict[str, Any] | None:
        words = (*self._logs(run), "--no-follow", "--tail", "100")
        return elsewhere.result(elsewhere.call(words, check=False).stdout.splitlines())

    def _task(self, spec: JobSpec) -> dict[str, Any]:
        settings = self.settings
        resources = {
            **_given(settings, "infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "image_id"),
            **({"job_recovery": {"recover_on_exit_codes": [75]}} if settings.managed else {}),
        }
        command = elsewhere.command(spec, self._folder(spec.name), settings.python, "")
        script = RUN.format(
            procs=spec.procs,
            port=elsewhere.PORT,
            meeting=MEETING if spec.restarts else "",
            python=shlex.quote(settings.python),
            module=there.__name__,
        )
        return {
            "name": spec.name,
            "num_nodes": spec.nodes[1],
            **({"resources": resources} if resources else {}),
            **_given(settings, "workdir", "file_mounts", "volumes", "setup"),
            "envs": {there.PACKED: there.pack(command[3:], spec.environment)},
            "run": _Script(script),
        }

    def _folder(self, name: str) -> str:
        """The run's folder there. Raises UserError where it would go with the machines, or each had its own."""
        settings = self.settings
        kept = [*settings.volumes, *(path for path, what in settings.file_mounts.items() if _mounted(what))]
        folder = elsewhere.run_dir(settings.run_dir, kept, name)
        if not kept and (settings.nodes > 1 or settings.managed or settings.down):
            what = "what the run writes would be lost with the machines, and each machine would have its own"
            cure = (
                "set launcher.volumes or a bucket in launcher.file_mounts; one machine that stays: launcher.down=false"
            )
            raise UserError.of(what, cure)
        return folder or f"runs/{name}"

    def _logs(self, run: Path) -> tuple[str, ...]:
        said = jobs.noted(run, "skypilot")
        return ("sky", "jobs", "logs", "--name", said["job"]) if said["managed"] else ("sky", "logs", said["job"])


def _found(said: dict[str, Any]) -> dict[str, Any] | None:
    """The last job of a record's name; None where there is none. Raises UserError where SkyPilot cannot say."""
    words = ("sky", "jobs", "queue", "--all") if said["managed"] else ("sky", "queue", said["job"])
    printed = elsewhere.call((*words, "--output", "json")).stdout
    if SILENT in printed and "status: INIT" in printed:
        return {"status": "INIT"}
    if SILENT in printed and not re.search(GONE, printed):  # sky ends well all the same
        why = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", printed.partition(SILENT)[2].partition("{}")[0]).split())
        raise UserError.of(f"SkyPilot cannot say how {said['job']} stands: {why}", "mend what sky says, and ask again")
    start = re.search(r"^[\[{]", printed, re.MULTILINE)
    table = json.loads(printed[start.start() :]) if start else {}
    records = table.get(said["job"], []) if isinstance(table, dict) else table
    mine = [record for record in records if record["job_name"] == said["job"]]
    return max(mine, key=lambda record: int(record["job_id"]), default=None)


class _Script(str):
    """Shown line by line."""


class _Dumper(yaml.SafeDumper):
    """YAML of which scripts can be read."""


_Dumper.add_representer(_Script, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def _text(task: dict[str, Any]) -> str:
    said: str = yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=1 << 20, allow_unicode=False)
    return said


def _mounted(what: Any) -> bool:
    """True for a bucket that is written to; all else is a copy."""
    return isinstance(what, dict) and str(what.get("mode", "MOUNT")).upper() != "COPY"


def _given(settings: SkyPilotSettings, *keys: str) -> dict[str, Any]:
    """What says something."""
    return {key: value for key in keys if (value := getattr(settings, key))}


def _faults(settings: SkyPilotSettings) -> Iterator[Fault]:
    if not re.fullmatch(r"([A-Za-z][\w.-]*(:[1-9]\d*)?)?", settings.accelerators):
        what = f"launcher.accelerators={settings.accelerators} is no kind and number"
        yield Fault(what, "set launcher.accelerators=H100:8")
    for key in ("cpus", "memory"):
        value = getattr(settings, key)
        if not re.fullmatch(r"(\d+(\.\d+)?\+?)?", value):
            yield Fault(f"launcher.{key}={value} is no amount for SkyPilot", f"set launcher.{key}='64+'")
    for name in settings.secrets:
        if name in settings.environment:
            yield Fault(f"{name} is both in launcher.environment and in launcher.secrets", "leave one of them out")
