"""What a run keeps: checkpoints of all trained roles with the loop's own state, saved, committed and restored."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from loomtune import checkpoint
from loomtune.checkpoint import Reader, Saver, Servable
from loomtune.contracts import Adapter, Engine
from loomtune.errors import CheckpointError, LeaseLost
from loomtune.lease import Lease
from loomtune.run import Run


class Keeper:
    """The run's side of `loomtune.checkpoint`: which engines and state there are, and when a save is committed."""

    def __init__(self, run: Run, adapter: Adapter, lease: Lease) -> None:
        settings = run.settings.checkpoint
        self.run, self.adapter = run, adapter
        self.folder = run.folder / "checkpoints"
        self.saver = Saver(
            self.folder,
            run.world,
            run=run.plan.hash,
            attempt=lease.attempt,
            keep=settings.keep,
            background=settings.background,
            lease=lease.check,
            kinds=run.optimizer.state(),
        )
        self.state: dict[str, Any] = {}
        self._best = False

    def save(self, state: Mapping[str, Any], *, best: bool) -> None:
        """Copies everything now, writes it while training goes on. best: mark it once it is committed."""
        self.finish()
        run = self.run
        self._best = best
        self.saver.start(run.step, self._engines(), {**state, "seed": run.settings.seed}, self._servable())

    def ready(self) -> bool:
        """True where this rank has written what was started."""
        return self.saver.ready()

    def superseded(self) -> str:
        """What is said where a newer attempt has taken over; empty where none has. Rank 0 asks for all."""
        try:
            if self.run.world.leads:
                self.saver.lease()
        except LeaseLost as error:
            return str(error)
        return ""

    def finish(self) -> None:
        """Waits for a started save and commits it; on every rank. Raises CheckpointError if any rank failed."""
        path = self.saver.finish()
        if path is None:
            return
        if self._best and self.run.world.leads:
            checkpoint.mark_best(self.folder, path.name)
        self.run.events.tell("checkpoint_saved", run=self.run, path=path, step=checkpoint.step_of(path))

    def restore(self) -> bool:
        """Goes on from the checkpoint that a plugin names, or the latest valid one; False where there is none."""
        self.finish()
        run = self.run
        answer = run.events.ask("resume_point", run=run)
        path = run.world.broadcast((answer or checkpoint.latest(self.folder)) if run.world.leads else None)
        if path is None:
            return False
        self.load(Path(path))
        return True

    def load(self, path: Path, written_by: str = "") -> None:
        """Sets every trained engine and the run's step from a checkpoint of this run, wherever it lies.

        written_by: the hash that the run was trained under, where it is opened with settings of its own.
        Raises CheckpointError where it is of a run of other maths, whose moments, schedule and rows mean nothing here.
        """
        run = self.run
        with closing(Reader(path, run.world)) as reader:
            if reader.manifest.run != (written_by or run.plan.hash):
                what = f"{path} is of run {reader.manifest.run}, this is run {run.plan.hash}: other maths"
                raise CheckpointError(f"{what}\n    cure: name a checkpoint of this run, or set model.path={path}")
            for role, engine in self._engines().items():
                engine.load(reader.read(role), optimizer=True)
            self.state = dict(reader.state)
        run.step = reader.step
        run.events.tell("checkpoint_loaded", run=run, path=path, step=run.step)

    def _engines(self) -> dict[str, Engine]:
        """The trained engines, each under the first role that it serves."""
        engines: dict[str, Engine] = {}
        for name, role in self.run.roles.items():
            if role.engine in self.run.trained_engines() and role.engine not in engines.values():
                engines[name] = role.engine
        return engines

    def _servable(self) -> Servable:
        run = self.run

        def describe(folder: Path) -> None:
            run.model.save_config(folder)
            run.tokenizer.save(folder)

        return Servable(role="policy", adapter=self.adapter, base=run.model.origin, describe=describe)
