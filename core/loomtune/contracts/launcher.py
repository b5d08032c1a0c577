"""How the processes of a run are started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be started, as plain data.

    run: the folder that holds `run.yaml`. module: started as `python -m module RUN` on every rank.
    nodes: (least, most). procs: processes on a node. environment: added to the scrubbed one.
    seconds: wall-time limit, 0 for none. grace: seconds between a polite and a hard end.
    restarts: how often a failed group is started again.
    """

    run: Path
    module: str = "loomtune.worker"
    nodes: tuple[int, int] = (1, 1)
    procs: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: int = 0
    grace: int = 30
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a launcher would run: commands and files, made without side effects; `--dry-run` shows it."""

    commands: tuple[tuple[str, ...], ...]
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What a launched run is doing: `pending`, `running`, or the status of its `result.json`."""

    state: str
    detail: str = ""


class Launcher(ABC):
    """Starts runs on an existing engine. Imports no torch."""

    @abstractmethod
    def processes(self, many: bool) -> int:
        """World size that will be asked for; 0 where it is not known. many: whether the sharding can use several."""

    @abstractmethod
    def spec(self, run: Path, processes: int) -> JobSpec:
        """The job that starts a run's folder on so many processes in all, by the launcher's settings."""

    @abstractmethod
    def render(self, spec: JobSpec) -> Submission:
        """Pure: what `submit` would do."""

    @abstractmethod
    def submit(self, spec: JobSpec) -> str:
        """Starts it and returns an id; a launcher in the foreground returns when the run is over."""

    @abstractmethod
    def status(self, run: Path) -> JobStatus:
        """What the run is doing."""

    @abstractmethod
    def logs(self, run: Path) -> Iterator[str]:
        """The run's log, line by line."""

    @abstractmethod
    def cancel(self, run: Path) -> None:
        """Ends the run politely, then hard; leaves no process."""
