"""Runs to be compared: what was set, how each went, and which is best."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from loomtune.catalogue import is_many
from loomtune.errors import UserError
from loomtune.offers import AXES
from loomtune.plan import Plan
from loomtune_plugins.commands.sweeps.goal import Goal
from loomtune_plugins.commands.sweeps.items import WENT, recorded
from loomtune_plugins.commands.sweeps.request import parsed
from loomtune_plugins.lines import read

_AXES = tuple(axis.name for axis in AXES)
_NOT_COMPARED = ("run.dir", "tracker.wandb.group")


@dataclass(frozen=True, slots=True)
class Row:
    """A run. typed: its overrides without `run.dir`. settings: key to value of what was typed. lines: its metrics."""

    folder: Path
    typed: tuple[str, ...]
    settings: Mapping[str, Any]
    status: str
    value: float | None
    step: int
    error: str
    lines: Sequence[Mapping[str, Any]] = field(repr=False)
    resolved: Mapping[str, Any] = field(repr=False)

    @property
    def seconds(self) -> float:
        """Time in optimizer steps."""
        return sum(line.get("seconds") or 0.0 for line in self.lines)

    def setting(self, key: str) -> Any:
        """What was typed for a key; where nothing was, what it is by default."""
        return self.settings[key] if key in self.settings else _lookup(self.resolved, key)


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed alone. spread: the standard deviation of a sample."""

    settings: Mapping[str, Any]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return stdev(self.values) if len(self.values) > 1 else 0.0


def goal_of(folders: Sequence[Path]) -> Goal:
    """What the sweeps among the folders were after, or else what the first run keeps its best checkpoint by."""
    for folder in folders:
        if (known := folder / "sweep.json").is_file():
            said = json.loads(known.read_text())
            if "metric" in said:
                return Goal(said["metric"], said["mode"])
    plan = Plan.load(folders[0])
    return Goal(plan.root.evaluate.best, plan.root.evaluate.mode) if plan.root.evaluate.best else Goal()


def rows(folders: Sequence[Path], goal: Goal) -> list[Row]:
    """A row for each run, and for each item of a sweep. Raises UserError where a folder is neither."""
    found: list[Row] = []
    for folder in folders:
        if (folder / "sweep.json").is_file():
            found += [_row(Path(item["folder"]), goal, item) for item in recorded(folder) if "overrides" in item]
        elif (folder / "run.yaml").is_file():
            found.append(_row(folder, goal, {}))
        else:
            raise UserError.of(f"{folder} is neither a run nor a sweep", "name folders made by `loomtune train`")
    return found


def _row(folder: Path, goal: Goal, record: Mapping[str, Any]) -> Row:
    plan = Plan.load(folder) if (folder / "run.yaml").is_file() else None
    result, lines = _json(folder / "result.json"), read(folder)
    typed = tuple(record.get("overrides") or (plan.overrides if plan else ()))
    status = record.get("status") or result.get("status") or "unfinished"
    value = goal.of(result.get("metrics") or {}) if status in WENT else None
    if value is None and status != "failed" and (curve := goal.curve(lines)):
        value = curve[max(curve)]
    entries = parsed(typed)
    settings = {entry.key_or_group: entry.value() for entry in entries}
    return Row(
        folder,
        tuple(text for text, entry in zip(typed, entries, strict=True) if entry.key_or_group != "run.dir"),
        {key: value for key, value in settings.items() if key not in _NOT_COMPARED},
        status,
        value,
        max((line.get("step", 0) for line in lines), default=0),
        record.get("error") or result.get("error") or "",
        lines,
        plan.settings if plan else {},
    )


def differing(found: Sequence[Row]) -> list[str]:
    """Keys that somebody typed and that do not have the same value everywhere, in the order typed."""
    keys = dict.fromkeys(key for row in found for key in row.settings)
    return [key for key in keys if len({said(row.setting(key)) for row in found}) > 1]


def groups(found: Iterable[Row], keys: Sequence[str]) -> list[Group]:
    """Runs that went to their end, by all that differs but the seed."""
    by: dict[tuple[str, ...], list[Row]] = {}
    others = [key for key in keys if key != "seed"]
    for row in found:
        if row.status in WENT and row.value is not None:
            by.setdefault(tuple(said(row.setting(key)) for key in others), []).append(row)
    made = []
    for members in by.values():
        values = tuple(row.value for row in members if row.value is not None)
        made.append(Group({key: members[0].setting(key) for key in others}, values))
    return made


def best(found: Sequence[Row], keys: Sequence[str], goal: Goal) -> Row | None:
    """The best run among the settings that are best over their seeds; none where no run went to its end."""
    if not (ranked := sorted(groups(found, keys), key=lambda group: goal.rank(group.mean))):
        return None
    chosen = {key: said(value) for key, value in ranked[0].settings.items()}
    members = [
        row
        for row in found
        if row.status in WENT
        and row.value is not None
        and all(said(row.setting(key)) == text for key, text in chosen.items())
    ]
    return min(members, key=lambda row: goal.rank(row.value))


def said(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str) if isinstance(value, list | dict) else "" if value is None else str(value)


def _lookup(settings: Mapping[str, Any], key: str) -> Any:
    node: Any = settings
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if key in _AXES and isinstance(node, Mapping):
        return list(node) if is_many(key) else node.get("name")
    return node


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
