"""What is prepared, as plain data, and what a process makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from loomtune import __version__
from loomtune.catalogue import installed
from loomtune.contracts import Data, LinkStage, RowStage, Stage

FORMAT = 1
"""Of the manifest and of the work folder: raised when the same job gives other files."""

FILE = "job.json"


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that decides what is prepared.

    data, stages: settings as a plan has them. shown: what the manifest tells of the stages, without paths.
    fingerprint: of the data. inputs: what the manifest tells of them. versions: of what the stages decide by.
    """

    data: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    seed: int
    licence: str
    keep_dropped: bool
    fingerprint: str
    inputs: Sequence[Mapping[str, Any]]
    shown: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """Digest of it: two jobs of one key give the same bytes, on whatever machine."""
        parts = {name: value for name, value in asdict(self).items() if name not in ("data", "stages")}
        said = json.dumps([FORMAT, __version__, self.data["name"], parts], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Job:
        """The job of a work folder."""
        return cls(**json.loads((folder / FILE).read_text()))


@dataclass(frozen=True)
class Pass:
    """One way through all rows: rows are judged by the stages, and then described for the link, if one follows."""

    rows: tuple[str, ...]
    link: str | None


class Work:
    """A job in its work folder, with the parts that a process builds of it when it needs them."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job = folder, job

    @cached_property
    def data(self) -> Data:
        """Where the rows come from."""
        data: Data = installed().build("data", self.job.data["name"], self.job.data)
        return data

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Name to stage, in their order."""
        return {name: installed().build("stage", node["name"], node) for name, node in self.job.stages.items()}

    @cached_property
    def passes(self) -> list[Pass]:
        """The ways through the rows: each ends at a link, the last at the output."""
        passes, rows = list[Pass](), list[str]()
        for name, stage in self.stages.items():
            if isinstance(stage, RowStage):
                rows.append(name)
            else:
                passes.append(Pass(tuple(rows), name))
                rows = []
        return [*passes, Pass(tuple(rows), None)]

    def link(self, number: int) -> LinkStage:
        """The stage that ends a pass."""
        stage = self.stages[self.passes[number].link or ""]
        assert isinstance(stage, LinkStage)
        return stage


@cache
def opened(folder: str) -> Work:
    """The work of a folder; built once a process."""
    return Work(Path(folder), Job.load(Path(folder)))
