"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune.errors import UserError
from loomtune_plugins.trackers import rollouts
from loomtune_plugins.trackers.secrets import without_secrets
from loomtune_plugins.trackers.settings import WandbSettings

if TYPE_CHECKING:
    from loomtune.run import Run

LONGEST = 4_000
"""Characters of a text in a table."""

MODES = ("", "online", "offline", "disabled")


class Wandb(Tracker):
    """Logs to Weights & Biases. `RUN/wandb_id` names wandb's run, so that all attempts at a run are one there.

    wandb's own step is the optimizer step. Steps that a resumed run takes again are known to the server, which keeps
    its first values; they are the same.
    """

    def __init__(self, settings: WandbSettings) -> None:
        if settings.mode not in MODES:
            raise UserError.of(
                f"tracker.wandb.mode={settings.mode} is unknown",
                "set tracker.wandb.mode to online, offline or disabled",
            )
        self._settings = settings
        self._wandb: Any = None
        self._shown: int | None = None

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Starts wandb's run, or goes on with it."""
        import wandb

        settings = self._settings
        self._wandb = wandb.init(
            project=settings.project,
            entity=settings.entity or None,
            group=settings.group or None,
            tags=list(settings.tags) or None,
            name=run.settings.run.name or run.folder.name,
            id=_identity(run.folder),
            resume="allow",
            dir=str(run.folder),
            mode=self._mode(wandb),
            config={**without_secrets(run.plan.settings), "loomtune": {"hash": run.plan.hash, **run.plan.versions}},
            settings=wandb.Settings(silent=True),
        )

    @hookimpl
    def rollout_finished(self, run: Run, step: int, samples: Sequence[Mapping[str, object]]) -> None:
        """Shows the best and the worst completions of a batch, every few steps."""
        import wandb

        settings, last = self._settings, self._shown
        if not settings.rollouts or (last is not None and 0 <= step - last < settings.rollout_every):
            return
        self._shown = step
        rows = [rollouts.cells(step, row, LONGEST) for row in rollouts.telling(samples, settings.rollouts)]
        self._wandb.log({"rollouts": wandb.Table(columns=list(rollouts.COLUMNS), data=rows)}, step=step)

    @hookimpl
    def step_finished(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the step's metrics."""
        self._wandb.log(dict(metrics), step=step)

    @hookimpl
    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Adds an evaluation's metrics to its step."""
        self._wandb.log(dict(metrics), step=step)

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Ends wandb's run in the same way."""
        if self._wandb is None:
            return
        if status == "preempted":
            self._wandb.mark_preempting()
        self._wandb.finish(exit_code=0 if status in ("completed", "stopped") else 1)

    def describe(self, run: Run) -> str:
        """The run's page, or how to send what was kept here."""
        if self._wandb is None:
            return "wandb: not started"
        return f"wandb sync {Path(self._wandb.dir).parent}" if self._wandb.offline else f"wandb: {self._wandb.url}"

    def _mode(self, wandb: Any) -> Any:
        """None leaves it to wandb, which would ask for a key, or fail, where there is none: then offline."""
        if self._settings.mode:
            return self._settings.mode
        return None if "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False) else "offline"


def _identity(folder: Path) -> str:
    """The id of wandb's run, made once for a run's folder."""
    path = folder / "wandb_id"
    if not path.is_file():
        path.write_text(os.urandom(8).hex())
    return path.read_text().strip()
