"""Slurm: one job a run, or one array for many, which queue themselves again where a run was preempted."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loomtune.contracts import JobSpec, JobStatus, Launcher, Resources, Submission
from loomtune.errors import RunFailed, UserError
from loomtune_launchers import jobs
from loomtune_launchers.jobs import CANCELLED
from loomtune_launchers.slurm import log, queue
from loomtune_launchers.slurm import script as slurm_script
from loomtune_launchers.slurm.job import NODE_COMMAND, STOP
from loomtune_launchers.slurm.queue import NO_ANSWER, RUNNING, WAITING, Job
from loomtune_launchers.slurm.settings import SlurmSettings

SCRIPT = "job.sh"

PATIENCE = 600.0
"""Seconds that a cancelled job may take to leave: Slurm's `KillWait` and its epilog are the cluster's."""

BETWEEN = 1.0
"""Seconds between two questions to the controller about a job that is to end."""

SELDOM = 15.0
"""Seconds between two questions about an array, whose answer is long."""


class Slurm(Launcher):
    """Runs as jobs of a Slurm cluster whose nodes see the run's folder."""

    def __init__(self, settings: SlurmSettings) -> None:
        self.settings = settings
        self.detached = not settings.wait
        jobs.nodes(settings)
        jobs.processes_a_node(settings, 1)
        jobs.check_counts(settings)
        slurm_script.check(settings)

    def processes(self, many: bool) -> int:
        settings = self.settings
        return jobs.nodes(settings)[1] * jobs.processes_a_node(settings, max(1, settings.gpus) if many else 1)

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings = self.settings
        nodes = jobs.nodes(settings)
        procs = max(1, processes // nodes[1])
        return JobSpec(
            run=run,
            arguments=(str(run),),
            name=run.name,
            nodes=nodes,
            procs=procs,
            environment=jobs.threads(settings, procs, settings.cpus * procs),
            resources=Resources(gpus=settings.gpus, cpus=settings.cpus, memory=settings.memory),
            seconds=slurm_script.seconds(settings.time),
            grace=settings.grace,
            restarts=settings.restarts,
            requeues=settings.requeues,
        )

    def render(self, spec: JobSpec) -> Submission:
        files = self._files(spec) | {SCRIPT: slurm_script.script(self.settings, str(spec.run))}
        output = slurm_script.output(spec.run, "slurm-%j.out")
        return Submission(commands=(self._sbatch(spec, output, spec.run / SCRIPT),), files=files)

    def ready(self, run: Path) -> None:
        if (run / jobs.RECORD).is_file() and json.loads((run / jobs.RECORD).read_text())["launcher"] == "slurm":
            job = _job(run)
            if job.active():
                state, why = job.state()
                cure = f"wait for it, or end it by `loomtune cancel {run}`"
                if state == NO_ANSWER:
                    cure = f"ask again later; where its cluster is no more, remove {run / jobs.RECORD}"
                    state = f"perhaps not over, as Slurm does not say: {why}"
                raise UserError.of(f"{run} is job {job.number} already, which is {state.lower()}", cure)

    def submit(self, spec: JobSpec) -> str:
        self._make_room(spec.run)
        submission = self.render(spec)
        job = self._queue(submission, spec.run)
        jobs.note(spec.run, "slurm", **_record(job, spec.run / f"slurm-{job.number}.out"))
        _say(f"queued as job {job.number}")
        if self.settings.wait:
            self._follow(spec.run, job)
        return job.number

    def submit_all(self, specs: Sequence[JobSpec], at_once: int) -> str | None:
        if len({slurm_script.options(self.settings, spec) for spec in specs}) != 1:
            return None  # an array is one request for resources
        for spec in specs:
            self._make_room(spec.run)
            _write(spec.run, self._files(spec))
        folder = specs[0].run.parent
        job = self._queue(self.render_all(specs, at_once), folder)
        for number, spec in enumerate(specs):
            output = folder / f"slurm-{job.number}_{number}.out"
            jobs.note(spec.run, "slurm", **_record(job.item(number), output))
        _say(f"queued as job {job.number}, an array of {len(specs)}")
        while self.settings.wait and job.active():
            time.sleep(SELDOM)
        return job.number

    def render_all(self, specs: Sequence[JobSpec], at_once: int) -> Submission:
        """Pure: the array's own files, in the folder that holds the runs, and its command."""
        folder = specs[0].run.parent
        table = json.dumps([str(spec.run) for spec in specs], indent=1) + "\n"
        name = f"array-{hashlib.sha256(table.encode()).hexdigest()[:8]}"
        script = slurm_script.script(self.settings, "--item-of", str(folder / f"{name}.json"))
        limit = f"%{at_once}" if at_once else ""
        output = slurm_script.output(folder, "slurm-%A_%a.out")
        command = self._sbatch(specs[0], output, folder / f"{name}.sh", f"--array=0-{len(specs) - 1}{limit}")
        return Submission(commands=(command,), files={f"{name}.json": table, f"{name}.sh": script})

    def status(self, run: Path) -> JobStatus:
        job, ended = _job(run), jobs.ended(run)
        state, reason = job.state()
        said = f"job {job.number}: {state.lower()}{f' ({reason})' if reason not in ('', 'None') else ''}"
        if state in WAITING:
            return JobStatus("pending", said)
        done = ended is not None and ended.state in ("completed", "stopped")
        if state in RUNNING and not done:  # what failed or was preempted may still be queued again
            return JobStatus("running", said)
        if not done and (_cancelled(run) or state == "CANCELLED"):
            return JobStatus("cancelled", said)
        if ended is not None:
            return ended
        if state in ("", NO_ANSWER):
            return JobStatus("unknown", f"job {job.number}: {reason or 'Slurm knows it no longer'}")
        return JobStatus("preempted" if state == "PREEMPTED" else "failed", said)

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        said, job = jobs.noted(run, "slurm"), _job(run)
        return log.lines(run, Path(said["output"]), job.active if follow else None)

    def cancel(self, run: Path) -> None:
        job = _job(run)
        if not job.active():  # how it ended stays what it was
            return
        (run / CANCELLED).touch()
        until = time.monotonic() + PATIENCE
        refused = job.cancel()
        while job.active():
            if refused and job.state()[0] != "COMPLETING":
                raise RunFailed(f"job {job.number} was not told to end: {refused}; it will not start again by itself")
            if time.monotonic() > until:
                raise RunFailed(f"job {job.number} was told to end and is still {job.state()[0].lower()}")
            time.sleep(BETWEEN)

    def _files(self, spec: JobSpec) -> dict[str, str]:
        command = slurm_script.on_nodes(self.settings, spec, Path.cwd())
        return {jobs.FILE: jobs.text(spec), NODE_COMMAND: json.dumps(command, indent=1) + "\n"}

    def _sbatch(self, spec: JobSpec, output: str, script: Path, *more: str) -> tuple[str, ...]:
        name = f"--job-name={slurm_script.label(spec.name)}"
        return ("sbatch", "--parsable", name, *slurm_script.options(self.settings, spec), *more, output, str(script))

    def _make_room(self, run: Path) -> None:
        """Takes away what forbids a start, or asks for its end. Raises UserError where the last job is not over."""
        self.ready(run)
        for name in (CANCELLED, STOP):
            (run / name).unlink(missing_ok=True)

    def _queue(self, submission: Submission, folder: Path) -> Job:
        _write(folder, submission.files)
        (command,) = submission.commands
        return Job.parse(queue.run(list(command), queue.environment()))

    def _follow(self, run: Path, job: Job) -> None:
        try:
            for line in self.logs(run, follow=True):
                print(line, flush=True)  # noqa: T201
        except KeyboardInterrupt:
            _say(f"job {job.number} goes on without us; `loomtune cancel {run}` ends it")
            raise


def _say(what: str) -> None:
    print(f"loomtune: {what}", file=sys.stderr, flush=True)  # noqa: T201


def _write(folder: Path, files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def _record(job: Job, output: Path) -> dict[str, str]:
    return {"job": job.number, "cluster": job.cluster, "output": str(output)}


def _job(run: Path) -> Job:
    said = jobs.noted(run, "slurm")
    return Job(said["job"], said["cluster"])


def _cancelled(run: Path) -> bool:
    return (run / CANCELLED).exists()
