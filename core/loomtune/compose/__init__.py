"""Composition: Hydra, once, in the launching process: what the user typed becomes a plan, or every fault at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loomtune.catalogue import installed
from loomtune.compose.composition import Composition
from loomtune.compose.origins import origins
from loomtune.plan import Plan

__all__ = ["compose", "explain"]


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Plan:
    """The plan of these overrides. Raises UserError of all faults together, each with its cure."""
    catalogue, folders = installed(), _absolute(config_dirs)
    settings = Composition(catalogue, overrides, folders).settings()
    return Plan(settings, catalogue.versions(), 0, tuple(overrides), folders)


def explain(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[tuple[str, Any, str]]:
    """(key, value, where it came from) of every setting, for `--dry-run`. Raises UserError as `compose` does."""
    return list(origins(Composition(installed(), overrides, _absolute(config_dirs))))


def _absolute(folders: Sequence[str]) -> tuple[str, ...]:
    """A resumed run is composed again, perhaps from elsewhere."""
    return tuple(str(Path(folder).expanduser().absolute()) for folder in folders)
