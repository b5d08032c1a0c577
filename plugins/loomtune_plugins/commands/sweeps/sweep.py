"""A sweep: every batch of items that its sweeper asks for is checked as a whole, then run; what is done stays done."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loomtune import api
from loomtune.catalogue import installed
from loomtune.contracts import Launcher
from loomtune.errors import LoomtuneError, RunFailed
from loomtune.plan import Plan
from loomtune_plugins.commands.sweeps.crew import Asked, Crew, failed, tell
from loomtune_plugins.commands.sweeps.goal import Goal
from loomtune_plugins.commands.sweeps.items import DONE, Item, keep
from loomtune_plugins.commands.sweeps.processes import Job, Process, Running
from loomtune_plugins.commands.sweeps.request import label

Answer = float | Exception | None
"""What a sweeper is told of an item: its value, or how it failed, or that it has none."""


@dataclass(slots=True)
class Sweep:
    """A folder of items.

    retries: whether items that failed before are tried again; not where a sweeper learns from what it was told, which
    would then ask for others. places: the environment of an item in each of the places that there are at a time.
    lock: an open file, held until the last of the items has gone. fixed: keys that all items have in common.
    """

    folder: Path
    goal: Goal
    asked: Asked
    lock: int
    config_dirs: tuple[str, ...] = ()
    retries: bool = True
    places: Sequence[dict[str, str]] = ({},)
    prune_after: int = 0
    fixed: frozenset[str] = frozenset()
    items: dict[str, Item] = field(default_factory=dict)

    def __call__(self, batch: Sequence[Sequence[str]]) -> list[Answer]:
        """Runs the items of a batch that are not done yet. Raises Preempted where the sweep was asked to leave."""
        items = [self._item(overrides) for overrides in batch]
        waiting = list({item.name: item for item in items if item.status == "waiting"}.values())
        self._check(waiting)
        ready = [item for item in waiting if item.plan]
        tell(f"{len(ready)} of {len(items)} items are to be run")
        crew = Crew(self._start, len(self.places), self.asked, self.prune_after)
        crew.curves |= {name: item.curve() for name, item in self.items.items() if item.status in DONE}
        begun = [] if self.asked.times else self._handed_over(ready)
        crew.run([item for item in ready if item.status == "waiting"], begun)
        return [_answer(item) for item in items]

    def _item(self, overrides: Sequence[str]) -> Item:
        item = Item.found(self.folder, overrides, self.goal)
        if item.name in self.items:
            return self.items[item.name]
        if item.status == "failed" and self.retries:
            item = Item(self.folder, tuple(overrides), self.goal)
        item.label = label(overrides, self.fixed)
        self.items[item.name] = item
        self.note()
        return item

    def note(self) -> None:
        """Writes down which items there are, those of earlier starts among them, for whoever compares them."""
        path = self.folder / "sweep.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        items = list(dict.fromkeys([*known.get("items", ()), *self.items]))
        known |= {"metric": self.goal.metric, "mode": self.goal.mode, "items": items}
        keep(path, known)

    def _check(self, items: Sequence[Item]) -> None:
        """Composes all before the first starts: one with faults has failed, which is said at once."""
        warned: list[str] = []
        for item in items:
            if self.asked.times:
                return
            try:
                warned += composed(item, self.config_dirs)
            except Exception as error:
                failed(item, error)
        for line in dict.fromkeys(warned):
            tell(line)

    def _start(self, item: Item, place: int) -> Running:
        assert item.plan is not None
        launcher: Launcher = item.plan.build(installed(), "launcher")
        if not launcher.detached:
            return Process(item, self.config_dirs, self._environment(item, place), self.lock)
        plan = api.compose(item.words(), self.config_dirs)
        api.launch(plan, api.announced(plan) if launcher.elsewhere else api.prepare(plan))
        return Job(item, launcher)

    def _environment(self, item: Item, place: int) -> dict[str, str]:
        """Several at a time share the cores out among them, where nobody else has."""
        assert item.plan is not None
        alone = len(self.places) == 1 or "OMP_NUM_THREADS" in os.environ
        processes = max(1, item.plan.processes) * len(self.places)
        threads = {} if alone else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        return threads | self.places[place]

    def _handed_over(self, items: Sequence[Item]) -> list[Running]:
        """Items that an engine has: since an earlier start of the sweep, or now, as one job of several."""
        begun: list[Running] = []
        fresh: dict[str, list[Item]] = {}
        for item in items:
            assert item.plan is not None
            launcher: Launcher = item.plan.build(installed(), "launcher")
            if not launcher.detached:
                continue
            if (item.folder / "run.yaml").is_file() and _under_way(launcher, item.folder):
                begun.append(_job(item, launcher))
            elif type(launcher).submit_all is not Launcher.submit_all:
                fresh.setdefault(json.dumps(item.plan.chosen("launcher"), sort_keys=True), []).append(item)
        return [*begun, *(running for group in fresh.values() for running in self._submitted(group))]

    def _submitted(self, items: Sequence[Item]) -> list[Running]:
        """One array of the items; none where the launcher has no such thing after all."""
        plans = {item.name: plan for item in items if (plan := self._prepared(item))}
        ready = [item for item in items if item.name in plans]
        if not ready:
            return []
        launcher: Launcher = next(iter(plans.values())).build(installed(), "launcher")
        specs = [launcher.spec(item.folder, plans[item.name].processes, plans[item.name].overrides) for item in ready]
        try:
            if launcher.submit_all(specs, len(self.places)) is None:
                return []
        except LoomtuneError as error:
            for item in ready:
                failed(item, error)
            return []
        tell(f"{len(ready)} items are one job, {len(self.places)} at a time")
        return [_job(item, launcher) for item in ready]

    def _prepared(self, item: Item) -> Plan | None:
        """The plan that lies in the item's folder; none, and the item has failed, where it could not be put there."""
        try:
            plan = api.compose(item.words(), self.config_dirs)
            api.prepare(plan)
        except Exception as error:
            failed(item, error)
            return None
        return plan


def _job(item: Item, launcher: Launcher) -> Job:
    item.status = "running"
    item.write()
    return Job(item, launcher)


def composed(item: Item, config_dirs: Sequence[str]) -> list[str]:
    """Gives the item its plan, and what is doubtful about it. Raises UserError of its faults."""
    plan = api.compose(item.words(), config_dirs)
    launcher: Launcher = plan.build(installed(), "launcher")
    found = api.check(plan, simulated=launcher.elsewhere)
    item.plan = plan
    return [f"{finding.what}\n    cure: {finding.cure}" for finding in found]


def _under_way(launcher: Launcher, folder: Path) -> bool:
    try:
        return launcher.status(folder).state in ("pending", "running")
    except LoomtuneError:
        return False  # it was prepared, and never submitted


def _answer(item: Item) -> Answer:
    if item.status in DONE:
        return item.value if item.valued else RunFailed(f"{item.name} has no {item.goal.metric}")
    return RunFailed(f"{item.name}: {item.error}")
