"""The plan: a checked composition, frozen. It knows no torch and no Hydra; ranks load it from `run.yaml`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from loomtune.catalogue import Catalogue, Entry, is_many, typed
from loomtune.errors import Fault, UserError
from loomtune.offers import AXES, Arity
from loomtune.settings import NOT_PART_OF_THE_MATHS, ROOT_KEYS, BatchSettings, Settings

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a preflight check saw. fatal: it refuses the run; otherwise it is shown as a warning."""

    what: str
    cure: str
    fatal: bool = True


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
    overrides, config_dirs: what the user typed, from which a resumed run is composed again.
    """

    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    processes: int = 0
    overrides: tuple[str, ...] = ()
    config_dirs: tuple[str, ...] = ()

    @property
    def root(self) -> Settings:
        """The settings that belong to no axis, typed."""
        root: Settings = typed(Settings, {key: self.settings[key] for key in ROOT_KEYS})
        return root

    @property
    def hash(self) -> str:
        """Digest of everything that decides the maths; see `settings.NOT_PART_OF_THE_MATHS`."""
        kept = copy.deepcopy(dict(self.settings))
        for key in NOT_PART_OF_THE_MATHS:
            parent, _, leaf = key.rpartition(".")
            (kept[parent] if parent else kept).pop(leaf, None)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

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
        """The implementation of an axis of one; None where an optional axis is empty."""
        choices = self.choices(axis)
        return next((catalogue.build(axis, node["name"], node) for node in choices.values()), None)

    def build_all(self, catalogue: Catalogue, axis: str) -> dict[str, Any]:
        """Name to implementation of an axis of many."""
        return {name: catalogue.build(axis, node["name"], node) for name, node in self.choices(axis).items()}

    def dump(self) -> str:
        """The text of `run.yaml`."""
        head = {"format": FORMAT, "hash": self.hash, "processes": self.processes}
        typed = {"overrides": list(self.overrides), "config_dirs": list(self.config_dirs)}
        frozen = {**head, **typed, "plugins": dict(self.versions), "settings": dict(self.settings)}
        text: str = yaml.safe_dump(frozen, sort_keys=False, width=120)
        return text

    @classmethod
    def parse(cls, text: str) -> Plan:
        """A plan from the text of `run.yaml`. Raises UserError where it was edited or is of another format."""
        try:
            frozen = yaml.safe_load(text)
            if not isinstance(frozen, dict) or frozen.get("format") != FORMAT:
                raise UserError.of("this run.yaml is of another format", "resume it with the version that wrote it")
            typed = tuple(frozen["overrides"]), tuple(frozen["config_dirs"])
            plan = cls(frozen["settings"], frozen["plugins"], frozen["processes"], *typed)
        except (yaml.YAMLError, KeyError, TypeError) as error:
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


def findings(plan: Plan, catalogue: Catalogue) -> list[Finding]:
    """Everything that the offers and the plugins' preflight hooks hold against a plan, or doubt."""
    entries = list(plan.entries(catalogue))
    found = [*_arity(plan), *_needs(entries), *_own(plan)]
    for answer, failure in _asked(catalogue, "preflight", plan):
        found.extend(answer)
        if failure:
            found.append(Finding(f"a check before the run is left out: {failure}", "tell its author", fatal=False))
    return found


def estimates(plan: Plan, catalogue: Catalogue) -> list[Estimate]:
    """Everything that the plugins foretell about a plan; one that fails foretells nothing."""
    return [one for answer, _ in _asked(catalogue, "estimate", plan) for one in answer]


def _asked(catalogue: Catalogue, hook: str, plan: Plan) -> Iterator[tuple[Sequence[Any], str]]:
    """(answer, why there is none) of each plugin, in their order. One that raises must not take the others' with it."""
    for implementation in getattr(catalogue.manager.hook, hook).get_hookimpls():
        arguments = [plan] if implementation.argnames else []
        try:
            yield list(implementation.function(*arguments)), ""
        except Exception as error:
            yield [], f"the plugin {implementation.plugin_name} failed: {type(error).__name__}: {error}"


def refuse(found: list[Finding]) -> list[Finding]:
    """Raises one UserError of all fatal findings; gives the others."""
    faults = [Fault(finding.what, finding.cure) for finding in found if finding.fatal]
    if faults:
        raise UserError(*faults)
    return found


def _arity(plan: Plan) -> Iterator[Finding]:
    for kind in AXES:
        if kind.arity is Arity.ONE and not plan.choices(kind.name):
            yield Finding(f"no {kind.name} is chosen", f"set {kind.name}=<name>; `loomtune plugins` lists them")


def _needs(entries: list[Entry]) -> Iterator[Finding]:
    """The rule across axes: what a choice needs, another choice provides."""
    provided = {trait: entry for entry in entries for trait in entry.offer.provides}
    for entry in entries:
        for trait in sorted(entry.offer.needs - provided.keys()):
            yield Finding(
                f"{entry.axis.name}={entry.offer.name} needs `{trait}`, which nothing chosen provides",
                f"`loomtune plugins --trait {trait}` lists what provides it",
            )


LEAST = {
    "batch.size": 1,
    "steps": 0,
    "stop_after": 0,
    "max_length": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "evaluate.every": 0,
    "evaluate.patience": 0,
    "evaluate.rows": 0,
}
KNOWN = {"precision": ("fp32", "bf16"), "evaluate.mode": ("min", "max")}


def _own(plan: Plan) -> Iterator[Finding]:
    """What the root settings say by themselves."""
    root = plan.root
    for key, least in LEAST.items():
        if (value := attrgetter(key)(root)) < least:
            yield Finding(f"{key}={value} is less than {least}", f"set {key} to at least {least}")
    for key, known in KNOWN.items():
        if (value := attrgetter(key)(root)) not in known:
            yield Finding(f"{key}={value} is unknown", f"set {' or '.join(f'{key}={name}' for name in known)}")
    yield from _micro(root.batch)
    if root.steps == 0 and root.epochs <= 0:
        yield Finding(f"steps=0 and epochs={root.epochs}: nothing would be trained", "set steps= or epochs=")
    if root.evaluate.patience and not root.evaluate.best:
        yield Finding("evaluate.patience is set, but no metric decides", "set evaluate.best=<metric>")
    if (root.evaluate.best or root.evaluate.every) and not plan.choices("evaluator"):
        yield Finding("evaluations are asked for, but no evaluator is chosen", "set evaluator=[heldout], for example")


def _micro(batch: BatchSettings) -> Iterator[Finding]:
    micro = batch.micro
    if isinstance(micro, str) and micro != "auto":
        yield Finding(f"batch.micro={micro} is neither a number nor `auto`", "set batch.micro=auto or to a number")
    elif isinstance(micro, int) and not 1 <= micro <= batch.size:
        yield Finding(
            f"batch.micro={micro} does not lie between 1 and batch.size={batch.size}",
            f"set batch.micro to at most {batch.size}, or raise batch.size (which is part of the maths)",
        )
