"""Finds plugins, gathers what they offer, and looks an offer up by name.

Built-ins come from a tuple of module names and pass through the same registration as anybody's; third parties come from
entry points of the group `loomtune`, in an order that does not depend on the machine, so that all ranks agree.
`LOOMTUNE_PLUGINS=a,b` lets in only these third parties; `LOOMTUNE_DISABLE_PLUGINS=1` lets in none.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distribution, entry_points
from typing import Any

from pluggy import PluginManager, PluginValidationError

from loomtune import __version__, hookspecs
from loomtune.errors import Fault, UserError, near
from loomtune.offers import AXES, Arity, Axis, Offer, axis

BUILT_IN = (
    "loomtune_plugins.models",
    "loomtune_plugins.data",
    "loomtune_plugins.objectives",
    "loomtune_plugins.adapters",
    "loomtune_plugins.shardings",
    "loomtune_plugins.optimizers",
    "loomtune_plugins.schedules",
    "loomtune_launchers",
    "loomtune_plugins.rollouts",
    "loomtune_plugins.kernels",
    "loomtune_plugins.trackers",
    "loomtune_plugins.evaluators",
    "loomtune_plugins.guards",
)


@dataclass(frozen=True, slots=True)
class Source:
    """Who brought a plugin: its name, and the distribution and version that it came with."""

    plugin: str
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An offer and who made it."""

    axis: Axis
    offer: Offer[Any]
    source: Source


class Catalogue:
    """Everything that can be chosen, by axis and name, and the plugins themselves, for hooks."""

    def __init__(self, plugins: Iterable[tuple[Source, object]], broken: Mapping[str, str] | None = None) -> None:
        self.manager = PluginManager("loomtune")
        self.manager.add_hookspecs(hookspecs)
        self.sources: dict[str, Source] = {}
        self.broken: dict[str, str] = dict(broken or {})
        self._entries: dict[tuple[str, str], Entry] = {}
        for source, plugin in plugins:
            self._admit(source, plugin)

    def _admit(self, source: Source, plugin: object) -> None:
        """Registers a plugin and its offers; a third party's that does not fit is put aside with its reason."""
        try:
            self.manager.register(plugin, name=source.plugin)
            self.manager.check_pending()
            entries = [Entry(kind, offer, source) for kind in AXES for offer in self._offers(kind, plugin)]
            for entry in entries:
                self._check(entry)
        except Exception as error:
            if self.manager.has_plugin(source.plugin):
                self.manager.unregister(name=source.plugin)
            if source.distribution == "loomtune" or isinstance(error, UserError):
                raise
            reason = str(error) if isinstance(error, PluginValidationError) else f"{type(error).__name__}: {error}"
            self._set_aside(source, reason)
            return
        self.sources[source.plugin] = source
        self._entries.update({(entry.axis.name, entry.offer.name): entry for entry in entries})

    def _set_aside(self, source: Source, reason: str) -> None:
        self.broken[source.plugin] = reason
        label = f"{source.plugin} ({source.distribution} {source.version})"
        print(f"loomtune: plugin {label} is broken and left out: {reason}", file=sys.stderr)  # noqa: T201

    def _offers(self, kind: Axis, plugin: object) -> list[Offer[Any]]:
        hook: Any = getattr(plugin, kind.hook, None)
        return list(hook()) if getattr(hook, "loomtune_impl", None) else []

    def _check(self, entry: Entry) -> None:
        taken = self._entries.get((entry.axis.name, entry.offer.name))
        if taken is not None:
            raise UserError.of(
                f"two plugins offer {entry.axis.name}={entry.offer.name}: {taken.source.plugin} of "
                f"{taken.source.distribution} and {entry.source.plugin} of {entry.source.distribution}",
                "uninstall one of them, or let in only the other with LOOMTUNE_PLUGINS=<names>",
            )
        if not dataclasses.is_dataclass(entry.offer.schema):
            raise TypeError(f"the schema of {entry.axis.name}={entry.offer.name} is no dataclass")
        if "name" in {field.name for field in dataclasses.fields(entry.offer.schema)}:
            raise TypeError(f"the schema of {entry.axis.name}={entry.offer.name} has a field `name`, which is reserved")

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
        broken = "".join(f" The plugin {plugin} is broken: {reason}." for plugin, reason in self.broken.items())
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
        module, _, attribute = entry.offer.build.partition(":")
        try:
            cls = getattr(import_module(module), attribute)
        except ImportError as error:
            extra = entry.offer.extra
            cure = f"pip install 'loomtune[{extra}]'" if extra else f"install or mend {entry.source.distribution}"
            raise UserError.of(f"{entry.axis.name}={entry.offer.name} cannot be imported: {error}", cure) from error
        contract_module, _, contract = entry.axis.contract.partition(":")
        if not issubclass(cls, getattr(import_module(contract_module), contract)):
            raise UserError.of(
                f"{entry.offer.build} of {entry.source.distribution} is no {contract}",
                f"its author must subclass {entry.axis.contract}",
            )
        return cls

    def versions(self) -> dict[str, str]:
        """Plugin name to distribution and version: what all ranks, and a resumed run, must agree on."""
        return {name: f"{source.distribution} {source.version}" for name, source in self.sources.items()}

    def config_sources(self) -> list[str]:
        """Hydra folders of all plugins, in the order of registration."""
        answers = reversed(self.manager.hook.config_sources())
        return [folder for answer in answers for folder in answer]


def typed(schema: type, settings: Mapping[str, Any]) -> Any:
    """Plain settings as an instance of their dataclass, checked by OmegaConf. `name` (the offer's) is left out."""
    from omegaconf import OmegaConf

    own = {key: value for key, value in settings.items() if key != "name"}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), own))


def is_many(kind: str) -> bool:
    """True where a run chooses any number of the axis' offers."""
    return axis(kind).arity is Arity.MANY


@cache
def installed() -> Catalogue:
    """The catalogue of this environment; made once a process."""
    plugins: list[tuple[Source, object]] = []
    broken: dict[str, str] = {}
    for name in BUILT_IN:
        plugins.append((Source(name, "loomtune", __version__), import_module(name)))
    for entry in _third_parties():
        source = _source(entry)
        try:
            plugins.append((source, entry.load()))
        except Exception as error:
            broken[source.plugin] = f"{type(error).__name__}: {error}"
            label = f"{source.plugin} ({source.distribution} {source.version})"
            print(f"loomtune: plugin {label} cannot be imported and is left out: {error}", file=sys.stderr)  # noqa: T201
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
