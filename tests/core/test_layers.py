"""Who may import whom: the contracts in pyproject.toml hold, and what must be quick to import is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loomtune.catalogue import BUILT_IN
from support import ROOT

QUICK = ("hookspecs", "contracts", "offers", "settings", "errors", "catalogue", "plan", "cli", "testing")


def imported_by(*modules: str) -> set[str]:
    program = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in ran.stdout.split()}


def test_the_contracts_of_imports_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_what_every_command_imports_is_light() -> None:
    light = [f"loomtune.{name}" for name in QUICK]
    assert not imported_by(*light, *BUILT_IN) & {"torch", "transformers", "hydra", "datasets", "wandb", "peft"}


def test_composing_and_the_api_import_no_torch() -> None:
    assert not imported_by("loomtune.api", "loomtune.compose") & {"torch", "transformers"}


def test_a_rank_never_imports_hydra() -> None:
    assert "hydra" not in imported_by("loomtune.worker", "loomtune.loop", "loomtune.assembly", "loomtune.keeper")


def packages() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "plugins" / "loomtune_plugins").glob("*/__init__.py"))


@pytest.mark.parametrize("axis", packages())
def test_every_axis_is_among_those_that_must_not_import_each_other(axis: str) -> None:
    assert f'"loomtune_plugins.{axis}"' in (ROOT / "pyproject.toml").read_text()
