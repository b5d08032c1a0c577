"""Hydra's part of a sweep: its config, and the sweeper that says which items there are.

Hydra's own multirun would compose them too, from a primary config; ours are composed by loomtune, so the sweeper is
given a loader that composes nothing. Hydra 1.3.8, which is pinned.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loomtune.errors import UserError
from loomtune_plugins.commands.sweeps.goal import Goal
from loomtune_plugins.commands.sweeps.request import Request, spread

SEED = 0
"""Of a sampler that was given none: a sweep that is started again must ask for the same items."""


class _Loader(ConfigLoaderImpl):
    """Leaves the composition of items to loomtune."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        return master_config


def config(request: Request) -> DictConfig:
    """Hydra's node as it was typed. Raises UserError where that makes none."""
    Plugins.instance()
    setup_globals()
    overrides = [*request.hydra, "hydra/launcher=loomtune"]
    loader = ConfigLoaderImpl(create_config_search_path(None))
    try:
        made: DictConfig = loader.load_configuration(None, overrides, RunMode.MULTIRUN)
        OmegaConf.to_container(made.hydra.launcher, resolve=True)
    except (
        HydraException,
        OmegaConfBaseException,
        AttributeError,
    ) as error:  # OmegaConf's, of {} for null
        told = " ".join(str(error.__cause__ or error).split("\n    full_key")[0].split()[:40])
        cure = "hydra.launcher has jobs, gpus, metric, mode and prune_after; a sweeper has what Hydra's pages say"
        if "hydra/sweeper/" in told or "hydra/sweeper=" in told or "'optuna'" in told:
            cure = "hydra/sweeper is basic, or optuna after pip install 'loomtune[sweeps]'"
        raise UserError.of(f"the sweep's own settings do not compose: {told}", cure) from error
    return made


def fit(made: DictConfig, request: Request, goal: Goal, folder: Path) -> None:
    """Defaults of sweepers that learn: they ask for the same again, bear failures, and go the goal's way."""
    sweeper = made.hydra.sweeper
    with open_dict(made.hydra):
        made.hydra.sweep.dir = str(folder)
        if "max_failure_rate" in sweeper and not request.set_by_hand("hydra.sweeper.max_failure_rate"):
            sweeper.max_failure_rate = 1.0
        if "direction" in sweeper:
            sweeper.direction = "maximize" if goal.mode == "max" else "minimize"
        sampler = sweeper.get("sampler")
        if isinstance(sampler, DictConfig) and "seed" in sampler and sampler.seed is None:
            sampler.seed = SEED


def swept(made: DictConfig) -> list[str]:
    """What the sweeper's own `params` add to the items."""
    params = made.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in params.items()]


def learns(made: DictConfig) -> bool:
    """Whether the sweeper asks by what it was told of the items before."""
    return "max_failure_rate" in made.hydra.sweeper


def run(made: DictConfig, request: Request, task: Callable[..., Any]) -> None:
    """Has the sweeper ask the task for items until it has no more. Raises UserError of what it cannot search."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"optuna|hydra_plugins\.hydra_optuna.*")
    warnings.filterwarnings("ignore", message="Deprecated API features detected")  # Optuna 2.10 of SQLAlchemy 1.4
    context = HydraContext(config_loader=_Loader(create_config_search_path(None)), callbacks=Callbacks())
    sweeper = Plugins.instance().instantiate_sweeper(config=made, hydra_context=context, task_function=task)
    logging.getLogger("optuna").setLevel(logging.WARNING)  # it set its own when the sweeper imported it
    words = spread(request.words)
    try:
        sweeper.sweep(arguments=words)
    except (HydraException, NotImplementedError) as error:
        cure = "`basic` takes lists, range and glob of what is there; interval and tag want hydra/sweeper=optuna"
        raise UserError.of(f"the sweeper cannot take this: {error}", cure) from error
