"""Hydra itself: where configs lie, the schemas in its store, and its answers without its tracebacks.

The loader is used by itself, without `hydra.main` and Hydra's global instance: composing leaves nothing behind, and the
folders that plugins bring count in every question. Hydra 1.3.8, which is pinned, has no public door to that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loomtune.catalogue import Catalogue, is_many
from loomtune.errors import Fault, UserError
from loomtune.offers import AXES
from loomtune.settings import Settings

ROOT = "config"
"""The config that everything begins with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One config of those that were merged, in the order of merging.

    label: `recipe=llama`, `config.yaml`, or `default` for a schema. chooses: groups whose choice it overrides.
    """

    label: str
    package: str
    config: DictConfig
    chooses: tuple[str, ...]


class Loader:
    """Loads configs from loomtune's own folder, the plugins' and the user's, in that order."""

    def __init__(self, catalogue: Catalogue, folders: Sequence[str]) -> None:
        version.setbase("1.3")
        Plugins.instance()
        JobRuntime.instance().set("name", "loomtune")
        self.faults = [fault for folder in folders for fault in _unreadable(Path(folder))]
        _register(catalogue)
        search = create_config_search_path("pkg://loomtune_conf")
        schemas = search.get_path().pop()
        for source in [*catalogue.configs, *(f"file://{folder}" for folder in folders)]:
            search.append("loomtune", source)
        search.append(schemas.provider, schemas.path)
        self._loader = _Merging(config_search_path=search)
        self._loaded, self._chosen = cache(self._load), cache(self._choices)
        for found in self._loader.get_sources():
            if found.provider == "loomtune" and found.scheme() != "file" and not found.available():
                cure = "install or mend the plugin that names it"
                self.faults.append(Fault(f"the configs in {found.full_path()} cannot be found", cure))

    def options(self, group: str) -> list[str]:
        """Names that can be chosen in a group."""
        return list(self._loader.get_group_options(group))

    def default_recipe(self) -> str:
        """The recipe that is called as the data are which `config.yaml` chooses; empty where there is none.

        So it is where those choices cannot be read, which is `load`'s to say.
        """
        with suppress(HydraException, OmegaConfBaseException, yaml.YAMLError):
            chosen = self._chosen()
            return next((name for name in self.options("recipe") if f"data/{name}" in chosen), "")
        return ""

    def load(self, overrides: Sequence[str]) -> DictConfig:
        """The composed config. Raises UserError where configs contradict the schemas or each other."""
        return self._loaded(tuple(overrides)).copy()

    def _load(self, overrides: tuple[str, ...]) -> DictConfig:
        try:
            self._loader.void = self._void(overrides)
            self._loader.typed = [text.partition("=")[0] for text in overrides]
            config = self._loader.load_configuration(ROOT, list(overrides), RunMode.RUN, from_shell=False)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(_refusal(error)) from error
        with open_dict(config):
            del config["hydra"]
        return config

    def parts(self, overrides: Sequence[str]) -> Iterator[Part]:
        """The configs that `load` merges."""
        void = self._void(overrides)
        for default in self._loader.compute_defaults_list(ROOT, list(overrides), RunMode.RUN).defaults:
            path = default.config_path or ""
            loaded = self._loader.repository.load_config(path) if path and not path.startswith("hydra") else None
            if loaded is None or not isinstance(loaded.config, DictConfig):
                continue
            _drop(loaded.config, path, void)
            group, _, name = path.rpartition("/")
            label = f"{group}={name}" if group else f"{name}.yaml"
            entries = [e for e in loaded.defaults_list or () if isinstance(e, GroupDefault) and e.override]
            chosen = tuple(str(entry.group).lstrip("/") for entry in entries)
            label = "default" if loaded.provider == "schema" else label
            yield Part(label, default.package or "", loaded.config, chosen)

    def _void(self, overrides: Sequence[str]) -> frozenset[str]:
        """Choices, as `axis/name`, that are made where the recipe alone is typed, and that other typed ones undo."""
        choices = [text for text in overrides if re.match(rf"~?({'|'.join(axis.name for axis in AXES)})(=|$)", text)]
        recipe = [text for text in overrides if text.startswith("recipe=")]
        return self._chosen(*recipe) - self._chosen(*choices, *recipe) if recipe and choices else frozenset()

    def _choices(self, *overrides: str) -> frozenset[str]:
        found = self._loader.compute_defaults_list(ROOT, list(overrides), RunMode.RUN).defaults
        return frozenset(str(one.config_path) for one in found if one.parent == ROOT)


class _Merging(ConfigLoaderImpl):
    """Hydra's merging, in which what a recipe says of a choice goes with that choice, and typed keys have a place."""

    void: frozenset[str] = frozenset()
    typed: Sequence[str] = ()

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        loaded = super()._load_single_config(default, repo)
        _drop(loaded.config, str(default.config_path), self.void)
        for key in self.typed:
            make_room(loaded.config, key)
        return loaded


def make_room(config: Any, key: str) -> None:
    """Puts settings with their defaults where a key leads through a mapping of settings (`data.sources.mine.path`).

    OmegaConf merges into such a mapping, but cannot set a key in what is not there yet.
    """
    with open_dict(config):
        for part in key.split("."):
            if not isinstance(config, DictConfig) or config._is_none() or config._is_missing():
                return
            kind: Any = config._metadata.element_type
            if dataclasses.is_dataclass(kind) and part not in config:
                config[part] = OmegaConf.structured(kind)
            config = config._get_node(part) if part in config else None


def _drop(config: Any, path: str, void: frozenset[str]) -> None:
    """Takes out of a recipe what it sets of choices that are not made; other configs stay as they are."""
    for choice in void if path.startswith("recipe/") else ():
        axis, name = choice.split("/", 1)
        node, key = (config.get(axis), name) if is_many(axis) else (config, axis)
        if isinstance(node, DictConfig) and key in node:
            del node[key]


def _register(catalogue: Catalogue) -> None:
    """Puts the root's and every offer's schema into Hydra's store, each with the offer's name in it."""
    store = ConfigStore.instance()
    axes = [(axis.name, Any, dataclasses.field(default=None)) for axis in AXES]
    store.store("settings", node=dataclasses.make_dataclass("Root", axes, bases=(Settings,)))
    for entry in list(catalogue.entries()):
        axis, offer = entry.axis.name, entry.offer
        node = dataclasses.make_dataclass(offer.schema.__name__, [("name", str, offer.name)], bases=(offer.schema,))
        try:
            OmegaConf.structured(node)
        except OmegaConfBaseException as error:
            catalogue.withdraw(entry, f"its settings are none that OmegaConf knows: {_one_line(error)}")
            continue
        store.store(offer.name, node=node, group=axis, package=f"{axis}.{offer.name}" if is_many(axis) else axis)


def _unreadable(folder: Path) -> Iterator[Fault]:
    """What is wrong with a user's folder of configs, before Hydra reads it."""
    if not folder.is_dir():
        yield Fault(f"there is no folder {folder}", "name an existing folder with --config-dir")
    for path in sorted(folder.rglob("*.yaml")):
        try:
            events = list(yaml.parse(path.read_text(), Loader=yaml.CSafeLoader))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            yield Fault(f"{path} cannot be read: {_one_line(error)}", "mend the file")
            continue
        if any(isinstance(event, yaml.AliasEvent) for event in events):  # a few lines of them can ask for gigabytes
            yield Fault(f"{path} uses YAML aliases (`*name`), which are not expanded", "refer by ${key} instead")


def _refusal(error: Exception) -> Fault:
    """Hydra's complaint in one line; the cause, which names the key, is often one further down."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = re.search(r"full_key: (\S+)", str(cause))
    told = _one_line(str(error) if str(error).startswith("In '") else cause)
    where = f" (the key is {key[1]})" if key and key[1] not in told else ""
    return Fault(f"the configuration does not compose: {told}{where}", "mend or remove that key where it is set")


def _one_line(error: object) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split()[:40])
