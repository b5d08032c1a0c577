"""Composition: Hydra, once, in the launching process; from what was typed to a frozen plan, or to all faults at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loomtune.catalogue import Catalogue, installed, is_many, typed
from loomtune.errors import Fault, UserError, near
from loomtune.offers import AXES
from loomtune.plan import Plan
from loomtune.settings import ROOT_KEYS, Settings

DEFAULT_RECIPE = "sql_quiz"
"""What runs where no data of one's own are named; it belongs to the data of that name."""

AXIS_NAMES = tuple(axis.name for axis in AXES)
RESOLVERS: tuple[str, ...] = ()
"""Resolvers that a config may call: none. `${other.key}` is a reference, not a call, and is welcome."""


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Plan:
    """The plan of these overrides. Raises UserError of all faults together, each with its cure."""
    return _Composition(overrides, config_dirs).plan()


def explain(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[tuple[str, Any, str]]:
    """(key, value, where it came from) of every setting, for `--dry-run`."""
    return list(_Composition(overrides, config_dirs).origins())


class _Composition:
    def __init__(self, overrides: Sequence[str], config_dirs: Sequence[str]) -> None:
        self.catalogue = installed()
        _register(self.catalogue)
        sources = [*(f"file://{folder}" for folder in config_dirs), *self.catalogue.config_sources()]
        self.search = [f"hydra.searchpath=[{','.join(sources)}]"] if sources else []
        self.typed = (tuple(overrides), tuple(config_dirs))
        self.faults: list[Fault] = []
        self.parsed = [override for text in overrides if (override := self._parse(text))]
        self.parsed = [*self._recipe(), *self.parsed]

    def plan(self) -> Plan:
        with _hydra():
            config = self._config()
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[assignment]
        self._check_types(settings)
        self._stop_if_faulty()
        settings = {key: value for key, value in settings.items() if value not in ({}, None)}
        return Plan(settings, self.catalogue.versions(), 0, *self.typed)

    def origins(self) -> Iterator[tuple[str, Any, str]]:
        typed_keys = {override.key_or_group for override in self.parsed if not self._is_group(override)}
        chosen = {o.key_or_group: o.get_value_string() for o in self.parsed if self._is_group(o)}
        settings = self.plan().settings
        defaults = dict(_leaves(self._defaults(settings)))
        for key, value in _leaves(settings):
            axis = key.partition(".")[0]
            if any(key == typed_key or key.startswith(f"{typed_key}.") for typed_key in typed_keys):
                yield key, value, "command line"
            elif key in defaults and defaults[key] == value:
                yield key, value, "default"
            elif key.rpartition(".")[2] == "name" and axis in chosen:
                yield key, value, "command line"
            else:
                origin = f"recipe={chosen['recipe']}" if "recipe" in chosen else "conf/config.yaml"
                yield key, value, f"{axis}={chosen[axis]}" if axis in chosen else origin

    def _defaults(self, settings: dict[str, Any] | Any) -> dict[str, Any]:
        tree: dict[str, Any] = dataclasses.asdict(Settings())
        for axis in AXIS_NAMES:
            node = settings.get(axis) or {}
            if is_many(axis):
                tree[axis] = {key: self._schema_defaults(axis, one["name"]) for key, one in node.items()}
            elif node:
                tree[axis] = self._schema_defaults(axis, node["name"])
        return tree

    def _schema_defaults(self, axis: str, name: str) -> dict[str, Any]:
        schema = OmegaConf.structured(self.catalogue.find(axis, name).offer.schema)
        return OmegaConf.to_container(schema)  # type: ignore[return-value]

    def _parse(self, text: str) -> Override | None:
        try:
            return OverridesParser.create().parse_override(text)
        except HydraException:
            cure = "write key=value, and quote what the shell or Hydra would read: 'key=\"a, b\"'"
            self.faults.append(Fault(f"'{text}' cannot be read", cure))
            return None

    def _recipe(self) -> list[Override]:
        """The default recipe, unless another, or data of one's own, is asked for."""
        asked = {override.key_or_group: override.get_value_string() for override in self.parsed}
        if "recipe" in asked or asked.get("data", DEFAULT_RECIPE) != DEFAULT_RECIPE:
            return []
        return [OverridesParser.create().parse_override(f"recipe={DEFAULT_RECIPE}")]

    def _config(self) -> DictConfig:
        groups = [override for override in self.parsed if self._is_group(override)]
        for override in groups:
            self._check_choice(override)
        if self.faults:
            groups = []  # what can still be said about the other keys is said against the defaults
        base = self._run_hydra(groups)
        values = [override for override in self.parsed if not self._is_group(override)]
        for override in values:
            self._check_value(override, base)
        self._stop_if_faulty()
        config = self._run_hydra(self.parsed)
        self._check_resolvers(config)
        self._check_missing(config)
        self._stop_if_faulty()
        return config

    def _is_group(self, override: Override) -> bool:
        return override.key_or_group in (*AXIS_NAMES, "recipe")

    def _run_hydra(self, overrides: Sequence[Override]) -> DictConfig:
        try:
            return hydra_compose("config", overrides=[*self.search, *(o.input_line or "" for o in overrides)])
        except (HydraException, OmegaConfBaseException) as error:
            self.faults.append(Fault(f"the configuration does not compose: {error}", "mend the key that is named"))
            self._stop_if_faulty()
            raise

    def _check_choice(self, override: Override) -> None:
        group = override.key_or_group
        names = override.value() if override.value_type is not None else None
        options = GlobalHydra.instance().config_loader().get_group_options(group)
        for name in names if isinstance(names, list) else [names]:
            if name is not None and str(name) not in options:
                self.faults.append(self.catalogue.unknown(group, str(name), options))
        if isinstance(names, list) and (group == "recipe" or not is_many(group)):
            self.faults.append(Fault(f"{group}={names}: a run chooses one {group}", f"set {group}=<one name>"))

    def _check_value(self, override: Override, base: DictConfig) -> None:
        key = override.key_or_group
        known = OmegaConf.select(base, key, default=_ABSENT, throw_on_missing=False) is not _ABSENT
        if not known and not (override.is_add() and self._is_free(base, key)):
            if not OmegaConf.is_missing(base, key) and not self._exists(base, key):
                self.faults.append(self._unknown_key(key, base))
            return
        if key.rpartition(".")[2] == "name" and key.count("."):
            axis = key.partition(".")[0]
            if axis in AXIS_NAMES:
                self.faults.append(Fault(f"{key} names the choice itself", f"set {axis}={override.get_value_string()}"))
                return
        if known and not override.is_delete():
            self._check_type(override, base)

    def _exists(self, base: DictConfig, key: str) -> bool:
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(base, parent) if parent else base
        return isinstance(node, DictConfig) and leaf in node

    def _is_free(self, base: DictConfig, key: str) -> bool:
        """True where the key lies in a mapping whose keys are the user's own."""
        while "." in key:
            key = key.rpartition(".")[0]
            node = OmegaConf.select(base, key)
            if node is not None:
                return isinstance(node, DictConfig) and not dataclasses.is_dataclass(OmegaConf.get_type(node))
        return False

    def _check_type(self, override: Override, base: DictConfig) -> None:
        trial = base.copy()
        try:
            OmegaConf.update(trial, override.key_or_group, override.value())
        except OmegaConfBaseException as error:
            line = str(error).splitlines()[0]
            self.faults.append(Fault(f"{override.input_line}: {line}", "give a value of the type that it has"))

    def _unknown_key(self, key: str, base: DictConfig) -> Fault:
        axis, _, rest = key.partition(".")
        if is_axis := axis in AXIS_NAMES:
            owners = self._owners(axis, rest)
            if owners:
                return Fault(f"{key} is not a setting of what is chosen for {axis}", f"choose {' or '.join(owners)}")
        known = [name for name, _ in _leaves(OmegaConf.to_container(base))]
        inside = [name for name in known if is_axis and name.startswith(f"{axis}.") and not name.endswith(".name")]
        said = near(key, known)
        cure = (
            f"the settings there are: {', '.join(inside)}" if inside else "`loomtune train --dry-run` shows every key"
        )
        return Fault(f"there is no setting '{key}'.{said}", cure)

    def _owners(self, axis: str, rest: str) -> list[str]:
        """Choices of the axis that would have such a setting."""
        head, _, tail = rest.partition(".")
        if is_many(axis):
            return [f"{axis}=[...,{head}]"] if head in self.catalogue.names(axis) and tail else []
        entries = self.catalogue.entries(axis)
        return [
            f"{axis}={e.offer.name}" for e in entries if head in {f.name for f in dataclasses.fields(e.offer.schema)}
        ]

    def _check_resolvers(self, config: DictConfig) -> None:
        for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
            called = re.findall(r"\$\{\s*([\w.]+)\s*:", value) if isinstance(value, str) else []
            for name in set(called) - set(RESOLVERS):
                fault = Fault(f"{key} calls the resolver '{name}', which is not let in", "write the value itself")
                self.faults.append(fault)

    def _check_missing(self, config: DictConfig) -> None:
        for key in OmegaConf.missing_keys(config):
            self.faults.append(Fault(f"{key} has no value", f"set {key}=<value>"))

    def _check_types(self, settings: dict[str, Any]) -> None:
        """Every key that arrived, from whatever file, is one that a schema knows."""
        self._try_schema(Settings, {key: value for key, value in settings.items() if key in ROOT_KEYS}, "the root")
        for axis in AXIS_NAMES:
            node = settings.get(axis) or {}
            for key, choice in node.items() if is_many(axis) else [(axis, node)] if node else []:
                self._try_schema(self.catalogue.find(axis, choice["name"]).offer.schema, choice, f"{axis} {key}")
        for key in settings.keys() - {*ROOT_KEYS, *AXIS_NAMES}:
            self.faults.append(
                Fault(f"'{key}' is no key of loomtune.{near(key, [*ROOT_KEYS, *AXIS_NAMES])}", "remove it")
            )

    def _try_schema(self, schema: type, settings: Any, where: str) -> None:
        try:
            typed(schema, settings)
        except OmegaConfBaseException as error:
            self.faults.append(Fault(f"{where}: {str(error).splitlines()[0]}", "mend or remove that key"))

    def _stop_if_faulty(self) -> None:
        if self.faults:
            raise UserError(*self.faults)


_ABSENT = object()


@contextmanager
def _hydra() -> Iterator[None]:
    with initialize_config_module("loomtune_conf", version_base="1.3"):
        yield


def _register(catalogue: Catalogue) -> None:
    """Puts the root's and every offer's schema into Hydra's store, each with the offer's name in it."""
    store = ConfigStore.instance()
    axes = [(axis.name, Any, dataclasses.field(default=None)) for axis in AXES]
    store.store("settings", node=dataclasses.make_dataclass("Root", axes, bases=(Settings,)))
    for entry in catalogue.entries():
        axis, offer = entry.axis.name, entry.offer
        node = dataclasses.make_dataclass(offer.schema.__name__, [("name", str, offer.name)], bases=(offer.schema,))
        store.store(offer.name, node=node, group=axis, package=f"{axis}.{offer.name}" if is_many(axis) else axis)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; an empty mapping is one."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
