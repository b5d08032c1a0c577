"""What becomes of rows, counted by stage and reason, with the first examples of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loomtune.contracts import Dropped, Row
from loomtune.contracts.data import identity

READ = ""
"""In the place of a stage: reading."""

SHOWN, EXCERPT = 5, 300
"""How many examples of a reason are kept, and how many characters of each."""


class Counts:
    """Of some stages, over some of the rows. Those of parts add up, in the parts' order."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, Any]] = {}

    def passed(self, stage: str, rows: int) -> None:
        """So many rows came to a stage."""
        self._of(stage)["in"] += rows

    def dropped(self, stage: str, one: Dropped) -> None:
        """One of them goes no further."""
        of = self._of(stage)["dropped"].setdefault(one.reason, {"rows": 0, "examples": []})
        of["rows"] += 1
        if len(of["examples"]) < SHOWN:
            of["examples"].append(example(one))

    def add(self, other: Mapping[str, Any]) -> None:
        """What was counted over the rows that follow."""
        for stage, counted in other.items():
            own = self._of(stage)
            own["in"] += counted["in"]
            for reason, of in counted["dropped"].items():
                mine = own["dropped"].setdefault(reason, {"rows": 0, "examples": []})
                mine["rows"] += of["rows"]
                mine["examples"] = [*mine["examples"], *of["examples"]][:SHOWN]

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Counts:
        """Of all parts."""
        made = cls()
        for part in parts:
            made.add(part)
        return made

    def _of(self, stage: str) -> dict[str, Any]:
        return self.stages.setdefault(stage, {"in": 0, "dropped": {}})


def example(one: Dropped) -> dict[str, str]:
    """What people are shown of a dropped record: escaped, because it may hold whatever moves a terminal's cursor."""
    said = {"origin": _escaped(one.origin), "detail": _escaped(one.detail)}
    return {**said, "excerpt": excerpt(one.row)} if one.row else said


def excerpt(row: Row) -> str:
    """The beginning of what a row says."""
    try:
        said = identity(row).decode()
    except (TypeError, ValueError):  # what there was of a record that could not be read
        said = repr(dict(row))
    return _escaped(said)


def _escaped(text: str) -> str:
    plain = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[: EXCERPT + 1])
    return plain if len(plain) <= EXCERPT else f"{plain[:EXCERPT]}..."
