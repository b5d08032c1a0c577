"""From overrides to plain settings, or to every fault that can be seen in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException

from loomtune.catalogue import Catalogue, is_many, typed
from loomtune.compose.keys import Keys
from loomtune.compose.loader import Loader, make_room
from loomtune.compose.requests import AXIS_NAMES, Requests, subject, text_of
from loomtune.errors import Fault, UserError, near
from loomtune.offers import Arity, axis
from loomtune.role_models import misfits
from loomtune.settings import ROOT_KEYS, Settings, leaves

About = tuple[Fault, str]
"""A fault, and the axis or root key that it is about; empty where it is about everything."""


class Composition:
    """One request being composed."""

    def __init__(self, catalogue: Catalogue, loader: Loader, overrides: Sequence[str]) -> None:
        self.catalogue, self.loader = catalogue, loader
        self.requests = Requests.read(overrides, "" if loader.faults else loader.default_recipe())
        self.faults: dict[Fault, str] = dict.fromkeys(loader.faults, "") | self.requests.faults
        self.texts: list[str] = []

    def settings(self) -> dict[str, Any]:
        """The whole tree as plain data, checked. Raises UserError."""
        if self.loader.faults:
            self._refuse()
        config = self._config()
        for stage in (_calls_and_targets, _dangling, _missing):  # each relies on what those before it refuse
            self._refuse(stage(config))
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[assignment]
        self._refuse(self._unfitting(settings))
        return {key: value for key, value in settings.items() if value not in ({}, None)}

    def sound(self, axes: Sequence[str]) -> dict[str, Any]:
        """Settings of those axes that no fault is about, once `settings` has refused; plain, and without references."""
        doubted = set(self.faults.values())
        if doubted & {"", "recipe"}:
            return {}
        try:
            config = self.loader.load(self.texts)
        except UserError:
            return {}
        plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
        plain = {axis: plain[axis] for axis in axes if axis not in doubted and plain[axis]}
        whole = {axis: tree for axis, tree in plain.items() if not any("${" in text for text in _texts(tree))}
        return {axis: tree for axis, tree in whole.items() if not any(self._unfitting_axis(axis, tree))}

    def _config(self) -> DictConfig:
        """Twice: first the choices, against which each value is checked by itself; then all of it."""
        faults = {choice.key_or_group: list(self._misnamed(choice)) for choice in self.requests.choices}
        self.faults |= {fault: group for group, found in faults.items() for fault in found}
        faulty = {group for group, found in faults.items() if found}
        sound = [text_of(choice) for choice in self.requests.choices if choice.key_or_group not in faulty]
        self.texts = [text for text in sound if text]
        self.texts += self._brought(self.loader.load(self.texts))
        chosen = self.loader.load(self.texts)
        for override in self.requests.values:
            make_room(chosen, override.key_or_group)
        keys = Keys(chosen, self.catalogue)
        for override in self.requests.values:
            if self._depends_on(override, faulty):
                continue
            if fault := keys.fault(override):
                self.faults[fault] = subject(override.key_or_group)
            else:
                self.texts.append(text_of(override, new=keys.is_new(override.key_or_group)))
        self._refuse()
        return self.loader.load(self.texts)

    def _brought(self, config: DictConfig) -> list[str]:
        """What choices bring along on other axes, where nothing is chosen and nobody asked for nothing."""
        asked, brought = self.requests.chosen(), dict[str, tuple[str, ...]]()
        for kind in AXIS_NAMES:
            node = config[kind]
            for choice in () if not node else node.values() if is_many(kind) else (node,):
                if (name := choice.get("name")) in self.catalogue.names(kind):
                    brought |= self.catalogue.find(kind, name).offer.brings
        return [f"{a}=[{','.join(n)}]" for a, n in brought.items() if not config[a] and a not in asked]

    def _depends_on(self, override: Override, faulty: set[str]) -> bool:
        """True where nothing can be said about a key, because its choice is not known."""
        return override.key_or_group.partition(".")[0] in faulty or "recipe" in faulty

    def _misnamed(self, override: Override) -> Iterator[Fault]:
        group, asked = override.key_or_group, override.value()
        many, options = is_many(group), self.loader.options(group)
        names = asked if isinstance(asked, list) else [asked]
        if isinstance(asked, list) and not many:
            yield Fault(f"{override.input_line}: a run has one {group}, not a list", f"set {group}=<one name>")
        elif asked is None and group in AXIS_NAMES and axis(group).arity is Arity.ONE:
            yield Fault(f"{override.input_line}: a run needs one {group}", f"choose one of: {', '.join(options)}")
        elif len(set(map(str, names))) < len(names):
            yield Fault(f"{override.input_line} names a choice twice", "name each once")
        for name in names:
            if name is not None and str(name) not in options:
                yield self.catalogue.unknown(group, str(name), options)

    def _unfitting(self, settings: dict[str, Any]) -> Iterator[About]:
        """Every key that arrived, from whatever file, is one that a schema knows."""
        yield from _fault_of(Settings, {key: value for key, value in settings.items() if key in ROOT_KEYS}, "the root")
        for kind in AXIS_NAMES:
            yield from self._unfitting_axis(kind, settings.get(kind) or {})
        yield from ((fault, "roles") for fault in misfits(settings, self.catalogue))
        for key in settings.keys() - {*ROOT_KEYS, *AXIS_NAMES}:
            yield Fault(f"'{key}' is no key of loomtune.{near(key, [*ROOT_KEYS, *AXIS_NAMES])}", "remove it"), key

    def _unfitting_axis(self, kind: str, node: dict[str, Any]) -> Iterator[About]:
        names = self.catalogue.names(kind)
        for key, choice in (node if is_many(kind) else {kind: node} if node else {}).items():
            if not isinstance(choice, dict) or choice.get("name") not in names:
                cure = f"let it begin with `defaults: [NAME, _self_]`, NAME being one of {', '.join(names)}"
                yield Fault(f"the config chosen for {kind} does not say which {kind} it sets", cure), kind
            else:
                schema = self.catalogue.find(kind, choice["name"]).offer.schema
                yield from _fault_of(schema, choice, f"{kind}={key}" if is_many(kind) else kind)

    def _refuse(self, found: Iterable[About] = ()) -> None:
        self.faults |= found
        if self.faults:
            raise UserError(*self.faults)


def _fault_of(schema: type, settings: Any, where: str) -> Iterator[About]:
    try:
        typed(schema, settings)
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in dataclasses.fields(schema)) or "no settings"
        yield (
            Fault(f"{where}: {str(error).splitlines()[0]}", f"mend or remove that key; there are: {known}"),
            subject(where),
        )


def _calls_and_targets(config: DictConfig) -> Iterator[About]:
    """Anything in the settings that asks for code: `${resolver:...}` and Hydra's `_target_`."""
    for key, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if any(part in ("_target_", "_partial_", "_recursive_") for part in key.split(".")):
            yield Fault(f"{key}: a config names offers, never code", "remove it"), subject(key)
        for text in _texts(value):
            for name in _resolvers(text):
                cure = "write the value itself; `${other.key}` refers to another setting"
                yield Fault(f"{key} calls the resolver '{name}', which is not let in", cure), subject(key)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value if isinstance(value, list) else value.values():
            yield from _texts(part)


def _resolvers(text: str) -> list[str]:
    """Names of the resolvers that a text calls, nested ones too, by OmegaConf's own grammar."""
    if "${" not in text:
        return []
    try:
        pending, found = [grammar_parser.parse(text)], []
    except OmegaConfBaseException:
        return []  # what cannot be parsed is told where it is resolved
    while pending:
        context = pending.pop()
        if hasattr(context, "resolverName"):
            found.append(context.resolverName().getText())
        pending.extend(context.getChildren() if hasattr(context, "getChildren") else ())
    return found


def _dangling(config: DictConfig) -> Iterator[About]:
    """References that lead nowhere, in a circle, or to a value of another type."""
    for key, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if any("${" in text for text in _texts(value)):
            try:
                found = OmegaConf.select(config, key)
                if OmegaConf.is_config(found):
                    OmegaConf.to_container(found, resolve=True)
            except (OmegaConfBaseException, RecursionError) as error:
                told = str(error).splitlines()[0]
                what = f"{key}={value} cannot be resolved: {told}"
                yield Fault(what, "refer to a setting that has a value"), subject(key)


def _missing(config: DictConfig) -> Iterator[About]:
    for key in OmegaConf.missing_keys(config):
        yield Fault(f"{key} has no value", f"set {key}=<value>"), subject(key)
