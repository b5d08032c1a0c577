"""One run of a sweep: its overrides, its folder, and what is known of it on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune.compose import quoted
from loomtune.plan import Plan
from loomtune_plugins.commands.sweeps.goal import Goal
from loomtune_plugins.lines import read

WENT = ("completed", "stopped")
"""How a run ends that went as it should; `stopped` early, by a guard or by `stop_after`."""

DONE = (*WENT, "pruned")
"""What a sweep has no more to do for."""


@dataclass(slots=True)
class Item:
    """A run of a sweep. Its record lies beside its folder, because one that does not compose has none.

    status: `waiting`, `running`, `pruned`, `preempted`, `failed`, or as its run ended. value: of the sweep's metric.
    log: what its processes said. plan: where it composed. label: for people.
    """

    sweep: Path
    overrides: tuple[str, ...]
    goal: Goal
    status: str = "waiting"
    value: float | None = None
    error: str = ""
    plan: Plan | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """The digest of its overrides, in any order: the same item of the same sweep started again."""
        said = json.dumps(sorted(self.overrides), ensure_ascii=False)
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        return self.sweep / self.name

    @property
    def log(self) -> Path:
        return self.sweep / f"{self.name}.log"

    @classmethod
    def found(cls, sweep: Path, overrides: Sequence[str], goal: Goal) -> Item:
        """An item as an earlier start of the sweep left it; one that had begun and not ended waits again."""
        item = cls(sweep, tuple(overrides), goal)
        known = _json(item._record)
        if known.get("status") in (*DONE, "failed"):
            item.status, item.value, item.error = known["status"], known["value"], known["error"]
            if item.status in WENT:  # another metric may be asked for than then
                item.value = goal.of(item.result().get("metrics") or {})
        elif item.result().get("status") in WENT:  # the sweep was killed before it heard of it
            item.ended(item.result()["status"])
        return item

    @property
    def valued(self) -> bool:
        """Whether it came to a value that can be compared."""
        return self.value is not None and not math.isnan(self.value)

    def result(self) -> dict[str, Any]:
        """What `result.json` says; nothing where there is none."""
        return _json(self.folder / "result.json")

    def curve(self) -> dict[int, float]:
        """The metric after each step that has it."""
        return self.goal.curve(read(self.folder))

    def ended(self, status: str, error: str = "") -> None:
        """Writes down how it ended, with its value: the result's where it went to its end, else the last there is."""
        self.status, self.error = status, error
        self.value = self.goal.of(self.result().get("metrics") or {}) if status in WENT else None
        if status == "pruned" and (curve := self.curve()):
            self.value = curve[max(curve)]
        self.write()

    def write(self) -> None:
        """Keeps its record."""
        said = {"overrides": self.overrides, "status": self.status, "value": self.value, "error": self.error}
        keep(self._record, said)

    def words(self) -> list[str]:
        """What it is started with. wandb sees the sweep as a group, unless one was set.

        A tracker is no part of the maths, so that adding it makes no other run of it.
        """
        wandb = (self.plan.choices("tracker") if self.plan else {}).get("wandb")
        group = [f"tracker.wandb.group={quoted(self.sweep.name)}"] if wandb and not wandb.get("group") else []
        return [*self.overrides, f"run.dir={quoted(str(self.folder))}", *group]

    @property
    def _record(self) -> Path:
        return self.sweep / f"{self.name}.json"


def recorded(sweep: Path) -> list[Mapping[str, Any]]:
    """The records of all items of a sweep, each with its folder, in the order of the sweep."""
    order = _json(sweep / "sweep.json").get("items", [])
    return [_json(sweep / f"{name}.json") | {"folder": sweep / name} for name in order]


def keep(path: Path, said: Mapping[str, Any]) -> None:
    """Writes a file of the sweep whole or not at all, whenever the sweep is killed."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(said, indent=1) + "\n")
    draft.replace(path)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
