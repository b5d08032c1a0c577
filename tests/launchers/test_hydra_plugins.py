"""Hydra's launcher of loomtune's sweeps: Hydra finds it where it lies, and it only hands batches over."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from support import ROOT

CLASS = "hydra_plugins.loomtune_launcher.launcher.LoomtuneLauncher"


def made(task: Any, **sweeper: Any) -> Launcher:
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": CLASS, "jobs": 2}, "sweeper": sweeper}})
    return Plugins.instance().instantiate_launcher(hydra_context=None, task_function=task, config=config)


def test_hydra_finds_it_beside_the_plugins_of_others() -> None:
    assert any(found.__name__ == "LoomtuneLauncher" for found in Plugins.instance().discover(Launcher))
    assert not (ROOT / "launchers" / "hydra_plugins" / "__init__.py").exists(), "it would hide those of others"


def test_what_hydra_imports_at_each_start_brings_nothing_heavy() -> None:
    program = "import sys, hydra_plugins.loomtune_launcher.launcher\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in ran.stdout.split()}
    assert not names & {"torch", "loomtune", "loomtune_plugins", "optuna", "transformers"}


def test_a_batch_is_handed_over_as_a_whole_and_each_item_gets_its_value() -> None:
    seen: list[Sequence[Sequence[str]]] = []

    def task(batch: Sequence[Sequence[str]]) -> list[float]:
        seen.append(batch)
        return [0.5, 0.25]

    returned = made(task).launch([["seed=0"], ["seed=1"]], 0)
    assert seen == [[["seed=0"], ["seed=1"]]]
    assert [one.return_value for one in returned] == [0.5, 0.25]
    assert [one.overrides for one in returned] == [["seed=0"], ["seed=1"]]


def test_a_sweeper_that_bears_failures_is_told_of_them_and_another_sees_no_value() -> None:
    def task(batch: Sequence[Sequence[str]]) -> list[Any]:
        return [ValueError("no"), 1.0]

    told, _ = made(task, max_failure_rate=0.5).launch([["a=1"], ["a=2"]], 0)
    assert told.status is JobStatus.FAILED
    with pytest.raises(ValueError, match="no"):
        _ = told.return_value
    unseen, other = made(task, max_batch_size=None).launch([["a=1"], ["a=2"]], 0)
    assert (unseen.status, unseen.return_value, other.return_value) == (JobStatus.COMPLETED, None, 1.0)
