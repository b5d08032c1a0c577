"""How the processes of a run are started."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a job is given. 0 or empty: nothing is asked for.

    gpus: of a node. cpus: of a process. memory: of a node, as the engine writes it (`64G`).
    """

    gpus: int = 0
    cpus: int = 0
    memory: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be started, as plain data.

    run: the run's folder, where the job's own files lie too. name: of the job, for people.
    module, arguments: `python -m module arguments...` on every rank; `loomtune.worker` takes the run's folder.
    nodes: (least, most). procs: processes on a node. environment: added to the scrubbed one.
    seconds: wall-time limit, 0 for none. grace: seconds between a polite and a hard end.
    restarts: how often a failed group is started again where it is. requeues: how often a preempted job is queued anew.
    """

    run: Path
    module: str = "loomtune.worker"
    arguments: tuple[str, ...]
    name: str = "loomtune"
    nodes: tuple[int, int] = (1, 1)
    procs: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    seconds: int = 0
    grace: int = 30
    restarts: int = 0
    requeues: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a launcher would run, made without side effects; `--dry-run` shows it.

    commands: run here, in this order or, where each is a node's, all at once. input: what they read.
    files: what is written before, by path within the run's folder. environment: of the commands, beside the scrubbed
    outer one.
    """

    commands: tuple[tuple[str, ...], ...]
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    input: str = ""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What a launched run is doing: `pending`, `running`, `cancelled`, `unknown`, or the status of its result."""

    state: str
    detail: str = ""


class Launcher(ABC):
    """Starts runs on an existing engine. Imports no torch.

    detached: whether `submit` returns at once, the job being the engine's from then on.
    elsewhere: whether the job sees none of this machine's files: it then composes for itself, from what was typed.
    """

    detached: bool = False
    elsewhere: bool = False

    @abstractmethod
    def processes(self, many: bool) -> int:
        """World size that will be asked for; 0 where it is not known. many: whether the sharding can use several."""

    @abstractmethod
    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        """The job that starts a run's folder on so many processes in all, by the launcher's settings.

        typed: the overrides of the run, which a job elsewhere composes from.
        """

    @abstractmethod
    def render(self, spec: JobSpec) -> Submission:
        """Pure: what `submit` would do."""

    def ready(self, run: Path) -> None:
        """Raises UserError where an engine still has the run's last job: asked before anything of the run changes."""
        return

    @abstractmethod
    def submit(self, spec: JobSpec) -> str:
        """Starts it and returns an id; unless the launcher is detached, when the run is over."""

    def submit_all(self, specs: Sequence[JobSpec], at_once: int) -> str | None:
        """Starts several as one job of the engine, so many at once (0: all); None where it has no such thing."""
        return None

    @abstractmethod
    def status(self, run: Path) -> JobStatus:
        """What the run is doing."""

    @abstractmethod
    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        """The lines of all ranks of the last attempt, in order of time. follow: until the run is over."""

    @abstractmethod
    def cancel(self, run: Path) -> None:
        """Ends the run politely, then hard; leaves no process, and nothing that would start it again."""

    def result(self, run: Path) -> dict[str, Any] | None:
        """What `result.json` says; None where the run has left none, or none yet."""
        path = run / "result.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
        return found
