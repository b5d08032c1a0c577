"""Composition: Hydra, once, in the launching process: what the user typed becomes a plan, or every fault at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from loomtune.catalogue import installed, is_many
from loomtune.compose.composition import Composition
from loomtune.compose.loader import Loader
from loomtune.compose.origins import origins
from loomtune.compose.requests import quoted
from loomtune.contracts import Data, Model
from loomtune.errors import Fault, UserError
from loomtune.offers import AXES
from loomtune.plan import Plan

__all__ = ["compose", "explain", "quoted"]


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Plan:
    """The plan of these overrides. Raises UserError of all faults together, files that are missing among them."""
    folders = _absolute(config_dirs)
    composition = Composition(installed(), _loader(folders), overrides)
    try:
        settings = composition.settings()
    except UserError as error:
        raise UserError(*error.faults, *_absences(composition.sound(["model", "data"]))) from error
    plan = Plan(settings, installed().versions(), 0, tuple(overrides), folders)
    return replace(plan, how=tuple(_how(plan)))


def _how(plan: Plan) -> Iterator[str]:
    """Keys of the choices' settings that say how something is computed, never what."""
    for axis in AXES:
        for name, node in plan.choices(axis.name).items():
            where = f"{axis.name}.{name}" if is_many(axis.name) else axis.name
            known = fields(installed().find(axis.name, node["name"]).offer.schema)
            yield from (f"{where}.{entry.name}" for entry in known if entry.metadata.get("how"))


def _absences(sound: Mapping[str, Any]) -> Iterator[Fault]:
    """Files that are not there, said beside what did not compose: only what needs neither network nor tokenizer."""
    for axis, settings in sound.items():
        try:
            part: Model | Data = installed().build(axis, settings["name"], settings)
            part.find() if isinstance(part, Model) else part.check()
        except UserError as error:
            yield from error.faults


def explain(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[tuple[str, Any, str]]:
    """(key, value, where it came from) of every setting, for `--dry-run`. Raises UserError as `compose` does."""
    return list(origins(Composition(installed(), _loader(_absolute(config_dirs)), overrides)))


def _loader(folders: tuple[str, ...]) -> Loader:
    """A loader; the user's own folders are read anew each time, because their files may have changed."""
    return Loader(installed(), folders) if folders else _packaged()


@cache
def _packaged() -> Loader:
    return Loader(installed(), ())


def _absolute(folders: Sequence[str]) -> tuple[str, ...]:
    """A resumed run is composed again, perhaps from elsewhere."""
    return tuple(str(Path(folder).expanduser().absolute()) for folder in folders)
