"""Finds plugins, gathers what they offer, and looks an offer up by name.

Built-ins come from a tuple of module names and pass through the same registration as anybody's; third parties come from
entry points of the group `loomtune`, in an order that does not depend on the machine, so that all ranks agree.
`LOOMTUNE_PLUGINS=a,b` lets in only these third parties; `LOOMTUNE_DISABLE_PLUGINS=1` lets in none.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distribution, entry_points
from pkgutil import resolve_name
from typing import Any

from pluggy import PluginManager, PluginValidationError

from loomtune import __version__, hookspecs
from loomtune.errors import Fault, UserError, near
from loomtune.offers import AXES, Arity, Axis, Command, Offer

BUILT_IN_DISTRIBUTION = "loomtune"

BUILT_IN = (
    "loomtune_plugins.models",
    "loomtune_plugins.data",
    "loomtune_plugins.objectives",
    "loomtune_plugins.losses",
    "loomtune_plugins.rewards",
    "loomtune_plugins.adapters",
    "loomtune_plugins.shardings",
    "loomtune_plugins.optimizers",
    "loomtune_plugins.schedules",
    "loomtune_launchers",
    "loomtune_plugins.rollouts",
    "loomtune_plugins.kernels",
    "loomtune_plugins.trackers",
    "loomtune_plugins.evaluators",
    "loomtune_plugins.exporters",
    "loomtune_plugins.guards",
    "loomtune_plugins.stages",
    "loomtune_plugins.commands",
)


@dataclass(frozen=True, slots=True)
class Source:
    """Who brought a plugin: its name, and the distribution and version that it came with."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})"


@dataclass(frozen=True, slots=True)
class Entry:
    """An offer and who made it."""

    axis: Axis
    offer: Offer[Any]
    source: Source

    def __str__(self) -> str:
        return f"{self.axis.name}={self.offer.name}"


class Catalogue:
    """Everything that can be chosen, by axis and name, and the plugins themselves, for hooks.

    commands, configs: commands with who brought them, and folders of Hydra configs, in the order of registration.
    broken: plugin, with its distribution and version, to why it, or one of its offers, is left out.
    """

    def __init__(self, plugins: Iterable[tuple[Source, object]], broken: Mapping[str, str] | None = None) -> None:
        self.manager = PluginManager("loomtune")
        self.manager.add_hookspecs(hookspecs)
        self.sources: dict[str, Source] = {}
        self.broken: dict[str, str] = dict(broken or {})
        self._entries: dict[tuple[str, str], Entry] = {}
        self.commands: list[tuple[Command, Source]] = []
        self.configs: list[str] = []
        for source, plugin in plugins:
            self._admit(source, plugin)

    def _admit(self, source: Source, plugin: object) -> None:
        """Registers a plugin and its offers; a third party's that does not fit is put aside with its reason."""
        if source.plugin in self.sources:
            raise UserError.of(
                f"two plugins are called {source.plugin}: {self.sources[source.plugin]} and {source}",
                "uninstall one of the distributions",
            )
        try:
            self.manager.register(plugin, name=source.plugin)
            self.manager.check_pending()
            entries = [Entry(kind, offer, source) for kind in AXES for offer in _called(plugin, kind.hook)]
            self._check(entries)
            commands = [(_is_command(one), source) for one in _called(plugin, "commands")]
            configs = [str(folder) for folder in _called(plugin, "config_sources")]
        except Exception as error:
            if self.manager.get_plugin(source.plugin) is plugin:
                self.manager.unregister(name=source.plugin)
            if source.distribution == BUILT_IN_DISTRIBUTION or isinstance(error, UserError):
                raise
            reason = str(error) if isinstance(error, PluginValidationError) else f"{type(error).__name__}: {error}"
            self.broken[str(source)] = reason
            _warn(source, reason)
            return
        self.sources[source.plugin] = source
        self._entries.update({(entry.axis.name, entry.offer.name): entry for entry in entries})
        self.commands += commands
        self.configs += configs

    def _check(self, entries: Sequence[Entry]) -> None:
        """Refuses offers that are none, and names that are taken."""
        known = dict(self._entries)
        for entry in entries:
            asked = str(entry)
            taken = known.setdefault((entry.axis.name, entry.offer.name), entry)
            if taken is not entry:
                raise UserError.of(
                    f"two plugins offer {asked}: {taken.source} and {entry.source}",
                    "uninstall one of them, or let in only the third parties that you want: LOOMTUNE_PLUGINS=<names>",
                )
            if not (isinstance(entry.offer.schema, type) and dataclasses.is_dataclass(entry.offer.schema)):
                raise TypeError(f"the schema of {asked} is no dataclass")
            if "name" in {field.name for field in dataclasses.fields(entry.offer.schema)}:
                raise TypeError(f"the schema of {asked} has a field `name`, which is reserved")

    def withdraw(self, entry: Entry, reason: str) -> None:
        """Takes an offer away that turned out to be broken. Raises TypeError where it is a built-in one."""
        what = f"{entry}: {reason}"
        if entry.source.distribution == BUILT_IN_DISTRIBUTION:
            raise TypeError(what)
        del self._entries[entry.axis.name, entry.offer.name]
        self.broken[str(entry.source)] = what
        _warn(entry.source, what)

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """All entries, or one axis', in the order of axes and then of registration."""
        for axis_name in [kind] if kind else [entry.name for entry in AXES]:
            yield from (entry for (of, _), entry in self._entries.items() if of == axis_name)

    def names(self, kind: str) -> list[str]:
        """Names offered on an axis."""
        return [entry.offer.name for entry in self.entries(kind)]

    def find(self, kind: str, name: str) -> Entry:
        """The entry of that name. Raises UserError saying what was asked, what is near and what exists."""
        entry = self._entries.get((kind, name))
        if entry is not None:
            return entry
        raise UserError(self.unknown(kind, name, self.names(kind)))

    def unknown(self, kind: str, name: str, known: Iterable[str]) -> Fault:
        """The fault of asking an axis for a name that nobody offers."""
        known = list(known)
        offered = ", ".join(known) or "none: no plugin offers any"
        broken = "".join(f" The plugin {plugin} is left out: {reason}." for plugin, reason in self.broken.items())
        return Fault(
            f"no {kind} is called '{name}'.{near(name, known)}{broken}",
            f"choose one of: {offered} (`loomtune plugins` says more)",
        )

    def build(self, kind: str, name: str, settings: Mapping[str, Any]) -> Any:
        """The chosen implementation, made from its settings. Raises UserError where its library is missing."""
        entry = self.find(kind, name)
        cls = self._load(entry)
        return cls(typed(entry.offer.schema, settings))

    def _load(self, entry: Entry) -> Any:
        """The class that an offer names, once it is seen to meet its axis' contract."""
        asked = f"{entry} of {entry.source}"
        cls = imported(entry.offer.build, asked, entry.source, entry.offer.extra)
        contract = resolve_name(entry.axis.contract)
        if not (isinstance(cls, type) and issubclass(cls, contract)):
            cure = f"its author must subclass {entry.axis.contract}"
            raise UserError.of(f"{asked}: {entry.offer.build} is no {contract.__name__}", cure)
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            cure = f"its author must implement what {entry.axis.contract} asks for"
            raise UserError.of(f"{asked}: {entry.offer.build} lacks {', '.join(missing)}", cure)
        return cls

    def versions(self) -> dict[str, str]:
        """Plugin name to distribution and version: what all ranks, and a resumed run, must agree on."""
        return {name: f"{source.distribution} {source.version}" for name, source in self.sources.items()}


def _called(plugin: object, hook: str) -> list[Any]:
    """What a plugin's own implementation of an offering hook gives; nothing where it has none."""
    implementation: Any = getattr(plugin, hook, None)
    return list(implementation()) if getattr(implementation, "loomtune_impl", None) else []


def _is_command(one: Any) -> Command:
    if not isinstance(one, Command):
        raise TypeError(f"{one!r} is no command")
    return one


def imported(named: str, asked: str, source: Source, extra: str = "") -> Any:
    """What `package.module:name` names. Raises UserError, about what was asked, where it cannot be imported."""
    try:
        return resolve_name(named)
    except Exception as error:  # a plugin's module may fail in any manner
        brought = source.distribution
        cure = f"pip install '{brought}[{extra}]'" if extra else f"install or mend {brought}"
        raise UserError.of(f"{asked} cannot be imported: {type(error).__name__}: {error}", cure) from error


def _warn(source: Source, reason: str) -> None:
    print(f"loomtune: plugin {source} is broken and left out: {reason}", file=sys.stderr)  # noqa: T201


def typed(schema: type, settings: Mapping[str, Any]) -> Any:
    """Plain settings as an instance of their dataclass, checked by OmegaConf. `name` (the offer's) is left out."""
    from omegaconf import OmegaConf

    own = {key: value for key, value in settings.items() if key != "name"}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), own))


def settings_of(entry: Entry, words: Sequence[str], others: Mapping[str, Any]) -> dict[str, Any]:
    """An offer's node of a plan: its defaults, with settings of its own axis.

    words: these, as they are typed. others: the plan's settings, to which references lead.
    Raises UserError where it does not stand by itself.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    axis = entry.axis.name
    try:
        own = OmegaConf.from_dotlist([text.removeprefix(f"{axis}.") for text in words])
        tree = OmegaConf.create({**others, axis: OmegaConf.merge(OmegaConf.structured(entry.offer.schema), own)})
        plain: Any = OmegaConf.to_container(tree[axis], resolve=True, enum_to_str=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        told = f"{' '.join([str(entry), *words])} does not stand by itself: {str(error).splitlines()[0]}"
        raise UserError.of(told, f"`loomtune plugins {entry}` lists its settings") from error
    return {"name": entry.offer.name, **plain}


def is_many(kind: str) -> bool:
    """True for an axis of which a run chooses any number of offers; False for other axes and whatever is none."""
    return any(axis.name == kind and axis.arity is Arity.MANY for axis in AXES)


@cache
def installed() -> Catalogue:
    """The catalogue of this environment; made once a process."""
    plugins: list[tuple[Source, object]] = [
        (Source(name, BUILT_IN_DISTRIBUTION, __version__), import_module(name)) for name in BUILT_IN
    ]
    broken: dict[str, str] = {}
    for entry in _third_parties():
        source = _source(entry)
        try:
            plugins.append((source, entry.load()))
        except (Exception, SystemExit) as error:  # a module may even end the process when it is imported
            broken[str(source)] = reason = f"{type(error).__name__}: {error}"
            _warn(source, reason)
    return Catalogue(plugins, broken)


def _third_parties() -> list[EntryPoint]:
    """Entry points that the environment lets in, sorted: their own order is that of directories on the disk."""
    if os.environ.get("LOOMTUNE_DISABLE_PLUGINS") == "1":
        return []
    allowed = os.environ.get("LOOMTUNE_PLUGINS")
    found = sorted(entry_points(group="loomtune"), key=lambda entry: (entry.name, entry.value))
    return [entry for entry in found if allowed is None or entry.name in allowed.split(",")]


def _source(entry: EntryPoint) -> Source:
    found = entry.dist or distribution(entry.module.partition(".")[0])
    return Source(entry.name, found.name, found.version)
