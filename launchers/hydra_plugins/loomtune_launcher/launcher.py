"""Hydra's launcher of loomtune's sweeps, `hydra/launcher=loomtune`. Hydra imports this module whenever it starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LoomtuneLauncherConf:
    """What `hydra.launcher.` sets: docs/sweeps.md says what each of them does."""

    _target_: str = "hydra_plugins.loomtune_launcher.launcher.LoomtuneLauncher"
    jobs: int = 1
    gpus: int = 0
    metric: str = ""
    mode: str = ""
    prune_after: int = 0


ConfigStore.instance().store(
    group="hydra/launcher", name="loomtune", node=LoomtuneLauncherConf, provider="loomtune_launcher"
)


class LoomtuneLauncher(Launcher):
    """Hands all items of a batch to the task function at once: how many run at a time is its affair.

    The task function gives each item's value, or the exception by which it failed.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.task_function, self.config = task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """A sweeper that does not know how many failures it may bear would stop at the first, so it is told of none."""
        bears = "max_failure_rate" in self.config.hydra.sweeper
        return [
            self._returned(overrides, value if bears or not isinstance(value, Exception) else None)
            for overrides, value in zip(job_overrides, self.task_function(job_overrides), strict=True)
        ]

    def _returned(self, overrides: Sequence[str], value: Any) -> JobReturn:
        status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
        told = JobReturn(overrides=list(overrides), status=status)
        told.return_value = value
        return told
