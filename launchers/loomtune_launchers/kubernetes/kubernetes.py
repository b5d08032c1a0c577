"""Kubernetes: a TrainJob or a JobSet, made by kubectl and the cluster's own from then on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loomtune.contracts import JobSpec, JobStatus, Launcher, Resources, Submission
from loomtune.errors import UserError
from loomtune_launchers import elsewhere, jobs
from loomtune_launchers.asked import say
from loomtune_launchers.kubernetes import manifests
from loomtune_launchers.kubernetes.faults import KINDS, faults
from loomtune_launchers.kubernetes.manifests import LIFE_AFTER_GRACE, NODE
from loomtune_launchers.kubernetes.settings import KubernetesSettings

FILE = "job.yaml"

MOST = 128
"""Arguments, and variables, of a TrainJob."""

REQUEUES = 10
"""Where nothing is said of them."""

CLEARING = 120
"""Seconds beyond the pods' own in which the cluster may clear them away; a lost node's may stay for ever."""

POLL = 2.0
"""Seconds between questions to the cluster."""


class Kubernetes(Launcher):
    """Hands the run to a cluster that sees nothing of this machine."""

    detached = True
    elsewhere = True

    def __init__(self, settings: KubernetesSettings) -> None:
        self.settings = settings
        self._complaints: set[str] = set()
        if found := list(faults(settings)):
            raise UserError(*found)
        jobs.processes_a_node(settings, 1)
        jobs.check_counts(settings)
        jobs.check_environment([*settings.environment, *settings.secrets])
        for key, least in {"nodes": 1, "time": 0, "gpus": 0, "cpus": 0}.items():
            jobs.number(key, getattr(settings, key), least)
        jobs.number("requeues", settings.requeues or 0)
        self._folder(elsewhere.job_name(settings.job, Path("run")))

    def processes(self, many: bool) -> int:
        return self.settings.nodes * jobs.processes_a_node(self.settings, max(1, self.settings.gpus) if many else 1)

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        settings = self.settings
        name = elsewhere.job_name(settings.job, run)
        procs = max(1, processes // settings.nodes)
        return JobSpec(
            run=run,
            module=elsewhere.MODULE,
            arguments=elsewhere.arguments(typed, self._folder(name)),
            name=name,
            nodes=(settings.nodes, settings.nodes),
            procs=procs,
            environment=elsewhere.environment(settings, settings.cpus),
            resources=Resources(gpus=settings.gpus, cpus=settings.cpus, memory=settings.memory),
            seconds=settings.time,
            grace=settings.grace,
            restarts=settings.restarts,
            requeues=self._requeues(),
        )

    def render(self, spec: JobSpec) -> Submission:
        manifest = manifests.manifest(spec, self.settings, self._folder(spec.name))
        _within(manifest)
        create = self._kubectl("create", "-f", str(spec.run / FILE))
        return Submission(commands=(create,), files={FILE: manifests.text(manifest)})

    def submit(self, spec: JobSpec) -> str:
        submission = self.render(spec)
        self._make_way(spec.run)
        elsewhere.write(spec, submission)
        where = {"kubectl": self._kubectl(), "nodes": self.settings.nodes}
        jobs.note(spec.run, "kubernetes", job=spec.name, kind=self.settings.kind, **where)  # before Ctrl-C can break in
        try:
            for command in submission.commands:
                elsewhere.call(command)
        except UserError:
            (spec.run / jobs.RECORD).unlink()
            raise
        return spec.name

    def status(self, run: Path) -> JobStatus:
        found = self._found(run)
        if found is None:
            if (run / jobs.CANCELLED).exists():
                return JobStatus("cancelled")
            return JobStatus("unknown", "the cluster has no such job, or no more")
        state, detail = _state(found)
        if state in ("pending", "running"):
            return JobStatus(state, detail)
        return elsewhere.standing(self.result(run), state, detail)

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        if not follow:
            yield from sorted(self._said(run, "--tail=-1"))
            return
        last, heard, goes_on = "", set[str](), True
        while goes_on:
            goes_on = self.status(run).state in ("pending", "running")
            said = self._said(run, "--tail=-1", *(["-f"] * goes_on), *([f"--since-time={last}Z"] if last else []))
            for line in said if goes_on else sorted(said):
                if line not in heard:  # a stream that is opened anew begins with the last second
                    yield line
                if line[:19] > last:
                    last, heard = line[:19], set()
                heard.add(line)
            if goes_on:
                time.sleep(POLL)

    def cancel(self, run: Path) -> None:
        found = self._found(run)
        if found is None or _state(found)[0] in ("pending", "running"):  # else its pods still say how it ended
            (run / jobs.CANCELLED).touch()
            self._delete(run)

    def result(self, run: Path) -> dict[str, Any] | None:
        said = jobs.noted(run, "kubernetes")
        first = f"batch.kubernetes.io/job-completion-index=0,{_pods(said['job'])}"
        words = (*said["kubectl"], "logs", "--selector", first, f"--container={NODE}", "--tail=100")
        return elsewhere.result(elsewhere.call(words, check=False).stdout.splitlines())

    def _requeues(self) -> int:
        asked, kind = self.settings.requeues, self.settings.kind
        return asked if asked is not None else (REQUEUES if kind == "jobset" else 0)

    def _folder(self, name: str) -> str:
        """The run's folder in the pods. Raises UserError where nothing would be left of it."""
        settings = self.settings
        kept = (settings.mount,) if settings.volume else ()
        folder = elsewhere.run_dir(settings.run_dir, kept, name)
        if not folder:
            cure = "set launcher.volume to a PersistentVolumeClaim, or launcher.run_dir to where the runtime mounts one"
            raise UserError.of("nothing that the run writes would be kept", cure)
        return folder

    def _make_way(self, run: Path) -> None:
        """Takes away the ended job that this run was before. Raises UserError where it goes on."""
        if not (run / jobs.RECORD).is_file() or (found := self._found(run)) is None:
            return
        if _state(found)[0] in ("pending", "running"):
            raise UserError.of(f"the job of {run} goes on", f"wait for it, or end it: loomtune cancel {run}")
        self._delete(run)

    def _delete(self, run: Path) -> None:
        """Every pod is told to stop, and has its grace; none is left when this ends."""
        said = jobs.noted(run, "kubernetes")
        words = ("delete", KINDS[said["kind"]], said["job"], "--ignore-not-found", "--cascade=foreground", "--wait")
        elsewhere.call((*said["kubectl"], *words, f"--timeout={self.settings.grace + LIFE_AFTER_GRACE + CLEARING}s"))

    def _found(self, run: Path) -> dict[str, Any] | None:
        """The job as the cluster has it; None where it has none."""
        said = jobs.noted(run, "kubernetes")
        words = ("get", KINDS[said["kind"]], said["job"], "--ignore-not-found", "-o", "json")
        text = elsewhere.call((*said["kubectl"], *words)).stdout
        found: dict[str, Any] | None = json.loads(text) if text.strip() else None
        return found

    def _said(self, run: Path, *how: str) -> Iterator[str]:
        """Lines of all pods, `<time> <pod> <text>`; why there are none is told once, beside them."""
        said = jobs.noted(run, "kubernetes")
        job, which = said["job"], ("--selector", _pods(said["job"]), f"--container={NODE}")
        requests = f"--max-log-requests={said['nodes']}"
        for line in elsewhere.lines((*said["kubectl"], "logs", *which, requests, "--prefix", "--timestamps", *how)):
            if parts := re.fullmatch(r"\[pod/(\S+?)/\S+\] (\S+) ?(.*)", line):
                pod, stamp, text = parts.groups()
                yield f"{stamp} {pod.removeprefix(job + '-').rpartition('-')[0]} {text}"
            elif line.lower().startswith("error") and line not in self._complaints:
                self._complaints.add(line)
                say(line)

    def _kubectl(self, *words: str) -> tuple[str, ...]:
        settings = self.settings
        context = (f"--context={settings.context}",) if settings.context else ()
        namespace = (f"--namespace={settings.namespace}",) if settings.namespace else ()
        return ("kubectl", *context, *namespace, *words)


def _pods(job: str) -> str:
    """The label of the job's pods: a TrainJob's are those of the JobSet of its name."""
    return f"jobset.sigs.k8s.io/jobset-name={job},jobset.sigs.k8s.io/replicatedjob-name={NODE}"


def _state(found: dict[str, Any]) -> tuple[str, str]:
    """How a TrainJob or a JobSet stands, and what it says of that."""
    status = found.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Completed", "Failed"):
            state = "failed" if condition["type"] == "Failed" else "completed"
            return state, condition.get("message", "")
    parts = [*status.get("jobsStatus", ()), *status.get("replicatedJobsStatus", ())]
    ready = any(part["ready"] for part in parts if part["name"].endswith(NODE))
    again = f"start {status['restarts'] + 1}" if status.get("restarts") else ""
    return ("running" if ready else "pending"), again


def _within(manifest: dict[str, Any]) -> None:
    """Raises UserError where a TrainJob takes no more."""
    trainer = manifest["spec"].get("trainer", {})
    for what, key in (("arguments", "args"), ("variables", "env")):
        if (count := len(trainer.get(key, ()))) > MOST:
            cure = "set launcher.kind=jobset" + (", or put settings into a recipe" if key == "args" else "")
            raise UserError.of(f"{count} {what} are more than the {MOST} that a TrainJob takes", cure)
