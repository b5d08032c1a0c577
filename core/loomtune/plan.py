"""The plan: a checked composition, frozen. It knows no torch and no Hydra; ranks load it from `run.yaml`."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import yaml

from loomtune import extras
from loomtune.catalogue import Catalogue, Entry, is_many, typed
from loomtune.errors import Fault, UserError
from loomtune.offers import AXES, Arity
from loomtune.settings import NOT_PART_OF_THE_MATHS, ROOT_KEYS, BatchSettings, Settings, leaves

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a preflight check saw.

    fatal: it refuses the run; otherwise it is shown as a warning. extra: what `pip install` mends it, if one does.
    """

    what: str
    cure: str
    fatal: bool = True
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """An amount that a plugin foretells. unit: `bytes`, `seconds`, `tokens`, ...; reasoning: how it comes about."""

    subject: str
    value: float
    unit: str
    reasoning: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings, resolved, and who implements them.

    settings: the whole tree as plain data; an axis' node says by `name` which offer was chosen, and an axis of many
    holds a node for each choice. versions: plugin to distribution and version. processes: the world size asked for.
    overrides, config_dirs: what the user typed, from which a resumed run is composed again. how: keys of the choices'
    settings that are no part of the maths.
    """

    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    processes: int = 0
    overrides: tuple[str, ...] = ()
    config_dirs: tuple[str, ...] = ()
    how: tuple[str, ...] = ()

    @property
    def root(self) -> Settings:
        """The settings that belong to no axis, typed."""
        return _typed(json.dumps({key: self.settings[key] for key in ROOT_KEYS if key in self.settings}))

    @property
    def hash(self) -> str:
        """Digest of everything that decides the maths."""
        return hashlib.sha256(json.dumps(self.maths, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def maths(self) -> dict[str, Any]:
        """The settings that decide the maths: all but `settings.NOT_PART_OF_THE_MATHS` and `how`."""
        return reduce(_without, (*NOT_PART_OF_THE_MATHS, *self.how), dict(self.settings))

    def training(self, processes: int) -> int:
        """How many of so many processes train (0: not known): `rollout.ranks` of them only generate.

        Raises UserError where none does.
        """
        aside = int((self.settings.get("rollout") or {}).get("ranks", 0))
        if 0 < processes <= aside:
            what = f"rollout.ranks={aside} leaves none of {processes} processes to train"
            raise UserError.of(what, f"set launcher.procs={aside + 1} or more, or rollout.ranks=0")
        return max(0, processes - aside)

    def chosen(self, axis: str) -> Mapping[str, Any]:
        """Settings of the one choice of an axis; its `name` says which. Raises KeyError where none is chosen."""
        node: Mapping[str, Any] = self.settings[axis]
        return node

    def choices(self, axis: str) -> Mapping[str, Mapping[str, Any]]:
        """Name to settings of all choices of an axis, in the order given; empty where there is none."""
        node = self.settings.get(axis) or {}
        return node if is_many(axis) else ({node["name"]: node} if node else {})

    def entries(self, catalogue: Catalogue) -> Iterator[Entry]:
        """The catalogue's entries of everything chosen."""
        for kind in AXES:
            for settings in self.choices(kind.name).values():
                yield catalogue.find(kind.name, settings["name"])

    def build(self, catalogue: Catalogue, axis: str) -> Any:
        """What is chosen of an axis: its implementation, None where it may be and is empty; of many, by their names."""
        built = {name: catalogue.build(axis, node["name"], node) for name, node in self.choices(axis).items()}
        return built if is_many(axis) else next(iter(built.values()), None)

    def as_begun(self, before: Plan, catalogue: Catalogue) -> Plan:
        """This plan without settings that a version before did not have and that are at their defaults.

        So a run that an older version began, whose hash its checkpoints bear, goes on as what it is.
        """
        plan = self
        for key in dict(leaves(self.maths)).keys() - dict(leaves(before.maths)).keys():
            less = replace(plan, settings=_without(plan.settings, key))
            if less._filled(key, before, catalogue) == self._filled(key, before, catalogue) != {}:
                plan = less
        return plan

    def _filled(self, key: str, before: Plan, catalogue: Catalogue) -> Any:
        """The settings that a key is among, with their defaults; none where another plan has chosen others there."""
        axis = key.partition(".")[0]
        if axis in ROOT_KEYS:
            return self.root
        chosen = self.choices(axis)
        if chosen.keys() != before.choices(axis).keys():
            return {}
        return {name: typed(catalogue.find(axis, node["name"]).offer.schema, node) for name, node in chosen.items()}

    def dump(self) -> str:
        """The text of `run.yaml`."""
        head = {"format": FORMAT, "hash": self.hash, "processes": self.processes}
        typed = {"overrides": list(self.overrides), "config_dirs": list(self.config_dirs), "how": list(self.how)}
        frozen = {**head, **typed, "plugins": dict(self.versions)}
        frozen["settings"] = json.loads(json.dumps(dict(self.settings)))  # equal parts become two, not one and an alias
        text: str = yaml.safe_dump(frozen, sort_keys=False, width=120)
        return text

    @classmethod
    def parse(cls, text: str) -> Plan:
        """A plan from the text of `run.yaml`. Raises UserError where it was edited or is of another format."""
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.CSafeLoader)):
                raise yaml.YAMLError("it uses aliases (`*name`), a few lines of which can ask for gigabytes")
            frozen = yaml.safe_load(text)
            if not isinstance(frozen, dict) or frozen.get("format") != FORMAT:
                raise UserError.of("this run.yaml is of another format", "resume it with the version that wrote it")
            typed = [tuple(frozen[key]) for key in ("overrides", "config_dirs", "how")]
            plan = cls(frozen["settings"], frozen["plugins"], frozen["processes"], *typed)
        except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
            raise UserError.of(f"run.yaml cannot be read: {error!r}", "start a new run in another run.dir") from error
        if plan.hash != frozen["hash"]:
            raise UserError.of(
                "run.yaml does not match its own hash: it was edited",
                "start a new run with the changed settings; `loomtune resume RUN key=value` changes what may change",
            )
        return plan

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """The plan of a run's folder."""
        path = folder / "run.yaml"
        if not path.is_file():
            raise UserError.of(
                f"{folder} is no run's folder: it has no run.yaml", "name a folder made by `loomtune train`"
            )
        return cls.parse(path.read_text())


def _without(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Settings without a dotted key, and without groups that it alone was in."""
    head, _, rest = key.partition(".")
    inner = _without(tree.get(head) or {}, rest) if rest else {}
    return {name: inner if name == head else value for name, value in tree.items() if name != head or inner}


@lru_cache(maxsize=8)
def _typed(text: str) -> Settings:
    """Every check before a run asks for the root settings; `loomtune matrix` asks 1,000 plans."""
    root: Settings = typed(Settings, json.loads(text))
    return root


def findings(plan: Plan, catalogue: Catalogue) -> list[Finding]:
    """Everything that the offers and the plugins' preflight hooks hold against a plan, or doubt."""
    return [*itself(plan), *between(plan, catalogue)]


def itself(plan: Plan) -> Iterator[Finding]:
    """What is wrong whatever else is chosen: an axis left empty, a root setting that makes no sense."""
    for kind in AXES:
        if kind.arity is Arity.ONE and not plan.choices(kind.name):
            yield Finding(f"no {kind.name} is chosen", f"set {kind.name}=<name>; `loomtune plugins` lists them")
    for key, value in leaves(plan.settings):
        if isinstance(value, float) and math.isnan(value):
            yield Finding(f"{key}=nan is no number", f"set {key} to one, or leave it out")
    yield from _own(plan)


def between(plan: Plan, catalogue: Catalogue) -> Iterator[Finding]:
    """The rules across axes: what the choices lack, need and exclude, and what their plugins hold against the plan."""
    entries = list(plan.entries(catalogue))
    yield from _libraries(entries)
    yield from _needs(entries)
    yield from _excludes(entries, catalogue)
    sources = {entry.source.plugin for entry in entries}
    for answer, plugin, failure in _asked(catalogue, "preflight", plan=plan, provided=_provided(entries)):
        yield from answer
        if failure:
            told = f"a check before the run is left out: the plugin {plugin} failed: {failure}"
            yield Finding(told, f"mend {plugin}, or tell its author", fatal=plugin in sources)


def estimates(plan: Plan, catalogue: Catalogue) -> list[Estimate]:
    """Everything that the plugins foretell about a plan; one that fails foretells nothing."""
    return [one for answer, *_ in _asked(catalogue, "estimate", plan=plan) for one in answer]


def foreseen(plan: Plan, folder: Path, catalogue: Catalogue) -> list[Finding]:
    """What the plugins foresee of a run that is about to start. Raises UserError where it cannot go well."""
    found: list[Finding] = []
    for answer, plugin, failure in _asked(catalogue, "foresee", plan=plan, folder=folder):
        told = Finding(f"nothing was foreseen by {plugin}: {failure}", f"mend {plugin}, or tell its author", False)
        found += [told] if failure else answer
    return refuse(found)


def _asked(catalogue: Catalogue, hook: str, **given: Any) -> Iterator[tuple[Sequence[Any], str, str]]:
    """(answer, plugin, why there is none) of each in their order. One that raises must not take the others' with it."""
    for implementation in getattr(catalogue.manager.hook, hook).get_hookimpls():
        arguments = [given[name] for name in implementation.argnames]
        try:
            yield list(implementation.function(*arguments)), implementation.plugin_name, ""
        except Exception as error:
            yield [], implementation.plugin_name, f"{type(error).__name__}: {error}"


def refuse(found: list[Finding]) -> list[Finding]:
    """Raises one UserError of all fatal findings; gives the others."""
    faults = [Fault(finding.what, finding.cure) for finding in found if finding.fatal]
    if faults:
        raise UserError(*faults)
    return found


def _provided(entries: Sequence[Entry]) -> dict[str, str]:
    return {trait: str(entry) for entry in entries for trait in entry.offer.provides}


def _libraries(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Choices whose libraries come with an extra that is not installed."""
    for entry in entries:
        if lacking := extras.lacking(entry.source.distribution, entry.offer.extra):
            extra = f"{entry.source.distribution}[{entry.offer.extra}]"
            what = f"{entry} needs {', '.join(lacking)}"
            yield Finding(what, f"pip install '{extra}'", extra=extra)


def _needs(entries: Sequence[Entry]) -> Iterator[Finding]:
    """What a choice needs, another choice provides."""
    provided = _provided(entries)
    for entry in entries:
        for trait in sorted(entry.offer.needs - provided.keys()):
            yield Finding(
                f"{entry} needs `{trait}`, which nothing chosen provides",
                f"`loomtune plugins --trait {trait}` lists what provides it",
            )


def _excludes(entries: Sequence[Entry], catalogue: Catalogue) -> Iterator[Finding]:
    """What a choice excludes, no other choice provides."""
    for entry, other in itertools.permutations(entries, 2):
        for trait in sorted(entry.offer.excludes.keys() & other.offer.provides):
            axis = other.axis.name
            fitting = [str(one) for one in catalogue.entries(axis) if trait not in one.offer.provides]
            cure = f"choose {' or '.join([*fitting, f'another {entry.axis.name}'])}"
            yield Finding(f"{entry} does not go with {other}: {entry.offer.excludes[trait]}", cure)


def _own(plan: Plan) -> Iterator[Finding]:
    """What the root settings say by themselves."""
    root = plan.root
    yield from _limits(root)
    yield from _micro(root.batch)
    if root.steps == 0 and not 0 < root.epochs < math.inf:
        yield Finding(f"epochs={root.epochs}: nothing would be trained, or without end", "set steps= or epochs=")
    if root.batch.sampler == "packed" and not root.packing:
        what = "batch.sampler=packed chooses rows that fill one together, and packing=false gives each one of its own"
        yield Finding(what, "set packing=true, or batch.sampler=shuffled")
    if len(kernels := list(plan.choices("kernel"))) != 1:
        yield Finding(f"kernel=[{', '.join(kernels)}]: a run attends by one", "name one kernel, such as kernel=[sdpa]")
    if root.evaluate.patience and not root.evaluate.best:
        yield Finding("evaluate.patience is set, but no metric decides", "set evaluate.best=<metric>")
    if (root.evaluate.best or root.evaluate.every) and not plan.choices("evaluator"):
        yield Finding("evaluations are asked for, but no evaluator is chosen", "set evaluator=[heldout], for example")


def _limits(settings: Any, prefix: str = "") -> Iterator[Finding]:
    """What the options say of their own values."""
    for entry in fields(settings):
        key, value = f"{prefix}{entry.name}", getattr(settings, entry.name)
        least, among = entry.metadata.get("least"), entry.metadata.get("among")
        if is_dataclass(value):
            yield from _limits(value, f"{key}.")
        elif least is not None and value < least:
            yield Finding(f"{key}={value} is less than {least}", f"set {key} to at least {least}")
        elif among and value not in among:
            yield Finding(f"{key}={value} is unknown", f"set {' or '.join(f'{key}={name}' for name in among)}")


def _micro(batch: BatchSettings) -> Iterator[Finding]:
    micro = batch.micro
    if isinstance(micro, str) and micro != "auto":
        yield Finding(f"batch.micro={micro} is neither a number nor `auto`", "set batch.micro=auto or to a number")
    elif isinstance(micro, int) and not 1 <= micro <= batch.size:
        yield Finding(
            f"batch.micro={micro} does not lie between 1 and batch.size={batch.size}",
            f"set batch.micro to at most {batch.size}, or raise batch.size (which is part of the maths)",
        )
