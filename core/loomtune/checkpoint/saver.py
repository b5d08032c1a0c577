"""Saving: copy, write in a thread while training goes on, and commit once all ranks have written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from loomtune.checkpoint import folder as folders
from loomtune.checkpoint.files import Written, digest, sync_folder, write_bytes, write_tensors
from loomtune.checkpoint.manifest import Index, Manifest, merge
from loomtune.checkpoint.memory import give_back
from loomtune.checkpoint.snapshot import Servable, Snapshot, take
from loomtune.contracts.optimizer import StateKind
from loomtune.contracts.saved import HEADS_FILE, INDEX, index_text
from loomtune.contracts.sharding import Engine
from loomtune.errors import CheckpointError, LeaseLost
from loomtune.world import World

PATIENCE = 30.0
"""Seconds between signs of life from a rank that still writes: a slow disk must not meet a collective's time-out."""


@dataclass(slots=True)
class Report:
    """What a rank has written, or why it could not."""

    files: dict[str, Written] = field(default_factory=dict)
    index: Index = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A save under way."""

    step: int
    folder: Path
    thread: Thread
    report: Report


@dataclass
class Saver:
    """Writes checkpoints of one attempt at a run. `start` and `finish` are called on every rank, in the same order.

    folder: RUN/checkpoints, seen by all ranks. run: the run's id. attempt: of no other start of it. keep: how many
    stay. lease: raises LeaseLost where a newer attempt has taken over; asked on rank 0, just before the commit.
    kinds: the tensors that the optimizer declares.
    """

    folder: Path
    world: World
    _: KW_ONLY
    run: str
    attempt: str
    keep: int = 2
    background: bool = True
    lease: Callable[[], object] = lambda: None
    kinds: Mapping[str, StateKind] = field(default_factory=dict)
    _draft: Draft | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def start(
        self, step: int, engines: Mapping[str, Engine], state: Mapping[str, Any], servable: Servable | None = None
    ) -> None:
        """Copies the trained engines, by role, and begins to write; when it returns, training may go on.

        state: plain data, the same on every rank; rank 0's is kept. Errors of writing are raised by `finish`.
        """
        assert self._draft is None, "finish() comes before the next start()"
        self._count += 1
        draft = self.folder / f"{folders.name_of(step)}.tmp-{self.attempt}-{self._count}"
        text = json.dumps({"step": step, **state}, indent=1)
        snapshot = take(engines, servable, self.kinds, self.world)
        report = Report(index=snapshot.index)
        # A daemon: a process that fails elsewhere must not wait for a checkpoint that nobody will commit.
        thread = Thread(target=self._write, args=(draft, snapshot, servable, text, report), daemon=True)
        self._draft = Draft(step, draft, thread, report)
        thread.start()
        if not self.background:
            thread.join()

    def ready(self) -> bool:
        """True where this rank has written, or failed to; without communication."""
        return self._draft is not None and not self._draft.thread.is_alive()

    def finish(self) -> Path | None:
        """Waits for all ranks and commits; gives the checkpoint's folder, or None where nothing was started.

        Raises CheckpointError on every rank if any could not write, and LeaseLost if this attempt is superseded: then
        nothing is committed and what was there before is untouched.
        """
        if (draft := self._draft) is None:
            return None
        reports: list[Report | None] = [None]
        while None in reports:
            draft.thread.join(PATIENCE)
            reports = self.world.gather(None if draft.thread.is_alive() else draft.report)
        self._draft = None
        final = self.folder / folders.name_of(draft.step)
        error = self._commit(draft, final, [report for report in reports if report]) if self.world.leads else None
        if (error := self.world.broadcast(error)) is not None:
            raise error
        return final

    def _commit(self, draft: Draft, final: Path, reports: list[Report]) -> CheckpointError | LeaseLost | None:
        """Gives, not raises, what went wrong: the other ranks wait to hear of it."""
        try:
            if errors := [report.error for report in reports if report.error]:
                raise CheckpointError("; ".join(errors))
            self._seal(draft, reports)
            self.lease()
            folders.place(draft.folder, final)
        except LeaseLost as error:
            return LeaseLost(str(error))
        except (CheckpointError, OSError) as error:
            shutil.rmtree(draft.folder, ignore_errors=True)
            where = f"\n    cure: see that {self.folder} has space, may be written to and is shared by all nodes"
            return CheckpointError(f"step {draft.step} was not saved: {error}{where}")
        self._prune(final)
        return None

    def _seal(self, draft: Draft, reports: list[Report]) -> None:
        files = {name: file for report in reports for name, file in report.files.items()}
        index = merge(report.index for report in reports)
        head = {"run": self.run, "attempt": self.attempt, "step": draft.step, "world_size": self.world.size}
        Manifest(**head, files=files, index=index).write(draft.folder)  # type: ignore[arg-type]
        # Nodes that do not share the folder are found out here: files of other ranks are not in sight.
        folders.validate(draft.folder)
        for part in [*(path for path in draft.folder.rglob("*") if path.is_dir()), draft.folder]:
            sync_folder(part)

    def _prune(self, final: Path) -> None:
        """What is committed stays so, whether or not the old can be cleared away."""
        try:
            folders.prune(self.folder, final, self.keep)
        except OSError as error:
            print(f"loomtune: old checkpoints could not be removed: {error}", file=sys.stderr)  # noqa: T201

    def _write(self, draft: Path, snapshot: Snapshot, servable: Servable | None, state: str, report: Report) -> None:
        """The thread's work. Its errors travel in the report, so that all ranks hear of them in `finish`."""
        try:
            while snapshot.files:  # each file's copies are freed once they are written
                name, tensors = snapshot.files.popitem()
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                report.files[name] = write_tensors(draft / name, tensors)
                del tensors
                give_back()
            if self.world.leads:
                draft.mkdir(parents=True, exist_ok=True)
                report.files["state.json"] = write_bytes(draft / "state.json", state.encode())
                if servable:
                    report.files |= _write_servable(draft, snapshot, servable)
        except BaseException as error:
            report.error = f"rank {self.world.rank}: {type(error).__name__}: {error}"


def _write_servable(draft: Path, snapshot: Snapshot, servable: Servable) -> dict[str, Written]:
    """What only one rank writes for other programs; gives every file of it, the tensors of the snapshot left out."""
    place = draft / servable.folder
    place.mkdir(parents=True, exist_ok=True)
    if servable.adapter.saves_base:
        servable.describe(place)
        if len(set(snapshot.placed.values())) > 1:
            write_bytes(place / INDEX, index_text(snapshot.placed, snapshot.model_bytes).encode())
    else:
        servable.adapter.save(place, iter(snapshot.added.items()), servable.base)
    weights = {HEADS_FILE, *snapshot.placed.values()}
    files = [path for path in place.rglob("*") if path.is_file() and path.name not in weights]
    return {path.relative_to(draft).as_posix(): digest(path, sync=True) for path in files}
