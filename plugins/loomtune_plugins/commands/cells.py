"""What goes with what: every objective x adapter x sharding under the very checks of a run, computed from the offers.

One composition gives what is not varied; a cell replaces the choices of three axes in it and asks what `loomtune train`
would ask of the same settings: `plan.between`, the choices' own classes, and the sharding about the world size.
A model of a role beside the policy, such as a teacher, is the user's to name, so no cell is refused for want of one. An
objective that learns from rewards is given the first that needs nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from loomtune import extras
from loomtune.catalogue import Catalogue, Entry, installed, settings_of
from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune.plan import Finding, Plan, between, itself, refuse

VARIED = ("objective", "adapter", "sharding")
PROCESSES = 2
DATA = {Trait.COMPLETIONS, Trait.PAIRS, Trait.PROMPTS, Trait.LABELS, Trait.TEXTS}
"""What rows have; the base's may lack what an objective needs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An offer with the settings of one of its variants: empty where they do not stand by themselves.

    label: `fsdp`, or `fsdp tensor` for a variant. typed: the overrides that choose it. held: what its class holds
        against it.
    """

    entry: Entry
    label: str
    typed: tuple[str, ...]
    settings: Mapping[str, Any]
    held: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A combination. typed: overrides that make exactly it, but for files of data and models of roles.

    faults: for what a run of it is refused.
    """

    choices: Mapping[str, Choice]
    typed: tuple[str, ...]
    processes: int
    faults: tuple[Finding, ...]

    @property
    def extras(self) -> list[str]:
        """What `pip install` would have to bring, where that is all that it lacks."""
        lacking = {fault.extra for fault in self.faults}
        return sorted(lacking) if all(lacking) else []

    @property
    def status(self) -> str:
        """`works`, `refused`, or `needs` an extra."""
        return "works" if not self.faults else "needs" if self.extras else "refused"

    def described(self) -> dict[str, Any]:
        """As plain data."""
        reasons = [{"what": fault.what, "cure": fault.cure} for fault in self.faults]
        said = {"status": self.status, "extras": self.extras, "reasons": reasons, "overrides": list(self.typed)}
        return {axis: choice.label for axis, choice in self.choices.items()} | said | {"processes": self.processes}


def cells(
    overrides: Sequence[str] = (), processes: int = PROCESSES, catalogue: Catalogue | None = None
) -> Iterator[Cell]:
    """Every cell, in the catalogue's order; the sharding varies fastest. Raises UserError.

    overrides: what holds in all of them, a model that must suit the sharding among them; one that chooses a varied axis
        leaves only its offers and variants.
    processes: world size of the shardings that run on several; the others get one.
    """
    catalogue = catalogue or installed()
    given = [text for text in overrides if text.partition("=")[0] not in VARIED]
    for text in given:
        if text.partition(".")[0] in VARIED:
            raise UserError.of(f"{text} would be set aside: every row has its variant's settings", "leave it out")
    own = [] if any(text.startswith("recipe=") for text in given) else ["recipe=null"]  # the default one is a task's
    base = compose([*own, *given])
    refuse(list(itself(base)))
    only = dict(text.split("=", 1) for text in overrides if text not in given)
    axes = [list(_choices(catalogue, axis, only.get(axis), base, processes)) for axis in VARIED]
    beside = lru_cache(lambda *entries: _beside(catalogue, entries, base))
    for choices in itertools.product(*axes):
        moving = [choice.entry for choice in choices if choice.entry.offer.brings or choice.entry.offer.needs & DATA]
        yield _cell(catalogue, choices, beside(*moving), base, processes)


def _cell(catalogue: Catalogue, choices: Sequence[Choice], beside: Plan, base: Plan, processes: int) -> Cell:
    world = _world([choice.entry for choice in choices], processes)
    data = (f"data={beside.chosen('data')['name']}",) if beside.chosen("data") != base.chosen("data") else ()
    nodes = {choice.entry.axis.name: choice.settings for choice in choices}
    found = [finding for choice in choices for finding in choice.held]
    if all(nodes.values()):
        found += between(replace(beside, settings={**beside.settings, **nodes}, processes=world), catalogue)
    scored = (f"reward=[{','.join(beside.choices('reward'))}]",) if beside.choices("reward") else ()
    scored = () if base.choices("reward") else scored
    typed = (*base.overrides, *data, *scored, *(text for choice in choices for text in choice.typed))
    faults = tuple(dict.fromkeys(finding for finding in found if finding.fatal))
    return Cell(dict(zip(VARIED, choices, strict=True)), typed, world, faults)


def _beside(catalogue: Catalogue, entries: Sequence[Entry], base: Plan) -> Plan:
    """The base with what choices bring along on other axes, and with data that have what they need."""
    nodes: dict[str, Any] = {}
    for entry in entries:
        for axis, names in entry.offer.brings.items():
            if not base.choices(axis):
                nodes[axis] = {name: settings_of(catalogue.find(axis, name), (), base.settings) for name in names}
        data = catalogue.find("data", base.chosen("data")["name"])
        fitting = [e for e in catalogue.entries("data") if entry.offer.needs & DATA & e.offer.provides]
        if entry.offer.needs & DATA and data not in fitting and fitting:
            nodes["data"] = {"name": fitting[0].offer.name}
        if not base.choices("reward") and _takes_rewards(catalogue, entry):
            name = next((e.offer.name for e in catalogue.entries("reward") if not e.offer.needs), "")
            nodes["reward"] = {name: settings_of(catalogue.find("reward", name), (), base.settings)} if name else {}
    return replace(base, settings={**base.settings, **nodes}) if nodes else base


def _takes_rewards(catalogue: Catalogue, entry: Entry) -> bool:
    """Whether it is an objective that learns from rewards; one that cannot be made is told of by its own cells."""
    try:
        return entry.axis.name == "objective" and catalogue.build("objective", entry.offer.name, {}).takes_rewards()
    except Exception:
        return False


def _choices(catalogue: Catalogue, axis: str, name: str | None, base: Plan, processes: int) -> Iterator[Choice]:
    """An axis' offers, each with its variants; one that sets what is default anyway gives the plain offer its name."""
    for entry in [catalogue.find(axis, name)] if name else catalogue.entries(axis):
        found: dict[str, Choice] = {}
        for variant, typed in {"": (), **entry.offer.variants}.items():
            choice = _choice(catalogue, entry, variant, typed, base, processes)
            made = json.dumps(choice.settings, sort_keys=True) if choice.settings else variant
            found.pop(made, None)  # so that it also takes the place of its variant
            found[made] = choice
        yield from found.values()


def _choice(
    catalogue: Catalogue, entry: Entry, variant: str, typed: tuple[str, ...], base: Plan, processes: int
) -> Choice:
    choice = Choice(entry, f"{entry.offer.name} {variant}".strip(), (str(entry), *typed), {})
    try:
        choice = replace(choice, settings=settings_of(entry, typed, base.settings))
        if not extras.lacking(entry.source.distribution, entry.offer.extra):
            part = catalogue.build(entry.axis.name, entry.offer.name, choice.settings)
            if entry.axis.name == "sharding":
                part.check(_world([entry], processes))
                if any(text.startswith(("model=", "model.")) for text in base.overrides):
                    part.suits(base.build(catalogue, "model"))  # reads its config, so only where one is named
            if entry.axis.name == "objective":
                plan = _beside(catalogue, [entry], base)
                part.use(plan.build(catalogue, "loss"), plan.build(catalogue, "reward"))
    except UserError as error:
        return replace(choice, held=tuple(Finding(fault.what, fault.cure) for fault in error.faults))
    except Exception as error:  # a plugin's class may fail in any manner, which takes no other's cells away
        told = f"{entry} cannot be made: {type(error).__name__}: {error}"
        return replace(choice, held=(Finding(told, f"install or mend {entry.source.distribution}"),))
    return choice


def _world(entries: Sequence[Entry], processes: int) -> int:
    return processes if any(Trait.MANY_PROCESSES in entry.offer.provides for entry in entries) else 1
