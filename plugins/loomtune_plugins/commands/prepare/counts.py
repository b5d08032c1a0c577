"""What becomes of rows, counted by stage and reason, with the first examples of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loomtune.contracts import Dropped, Row
from loomtune.contracts.data import identity

READ = ""
"""In the place of a stage: reading."""

SHOWN, EXCERPT = 5, 300
"""How many examples of a reason are kept, and how many characters of each."""

EACH, BEFORE = 200, 60
"""Characters of each of two rows that are shown side by side, and how many of them stand before they part."""


class Counts:
    """Of some stages, over some of the rows. Those of parts add up, in the parts' order."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, Any]] = {}

    def passed(self, stage: str, rows: int) -> None:
        """So many rows came to a stage."""
        self._of(stage)["in"] += rows

    def dropped(self, stage: str, one: Dropped, other: Row | None = None) -> None:
        """One of them goes no further. other: the row that stays in its stead."""
        of = self._of(stage)["dropped"].setdefault(one.reason, {"rows": 0, "examples": []})
        of["rows"] += 1
        if len(of["examples"]) < SHOWN:
            of["examples"].append(example(one) if other is None else _beside(one, other))

    def changed(self, stage: str, before: Row, after: Row) -> None:
        """One of them goes on as another than it came."""
        of = self._of(stage).setdefault("changed", {"rows": 0, "examples": []})
        of["rows"] += 1
        if len(of["examples"]) < SHOWN:
            texts = dict(zip(("before", "after"), apart(before, after), strict=True))
            of["examples"].append({"origin": _escaped(str(before.get("origin", ""))), **texts})

    def held(self, stage: str, split: str, what: str) -> None:
        """One of a split that the inputs held out was dropped or changed."""
        if split != "train":
            of = self._of(stage).setdefault("held", {}).setdefault(split, {})
            of[what] = of.get(what, 0) + 1

    def add(self, other: Mapping[str, Any]) -> None:
        """What was counted over the rows that follow."""
        for stage, counted in other.items():
            own = self._of(stage)
            own["in"] += counted["in"]
            for reason, of in counted["dropped"].items():
                _add(own["dropped"], reason, of)
            if "changed" in counted:
                _add(own, "changed", counted["changed"])
            for split, of in counted.get("held", {}).items():
                mine = own.setdefault("held", {}).setdefault(split, {})
                mine.update({what: mine.get(what, 0) + rows for what, rows in of.items()})

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Counts:
        """Of all parts."""
        made = cls()
        for part in parts:
            made.add(part)
        return made

    def _of(self, stage: str) -> dict[str, Any]:
        return self.stages.setdefault(stage, {"in": 0, "dropped": {}})


def _add(to: dict[str, Any], key: str, of: Mapping[str, Any]) -> None:
    mine = to.setdefault(key, {"rows": 0, "examples": []})
    mine["rows"] += of["rows"]
    mine["examples"] = [*mine["examples"], *of["examples"]][:SHOWN]


def example(one: Dropped) -> dict[str, str]:
    """What people are shown of a dropped record: escaped, because it may hold whatever moves a terminal's cursor."""
    said = {"origin": _escaped(one.origin), "detail": _escaped(one.detail)}
    return {**said, "excerpt": excerpt(one.row)} if one.row else said


def _beside(one: Dropped, other: Row) -> dict[str, str]:
    mine, theirs = apart(one.row, other)
    return {"origin": _escaped(one.origin), "detail": _escaped(one.detail), "excerpt": mine, "stays": theirs}


def apart(one: Row, other: Row) -> tuple[str, str]:
    """Both rows around the first place in which they differ; their beginnings where they say the same."""
    texts = _said(one), _said(other)
    if texts[0] == texts[1] and one.keys() | other.keys():  # what rides along may differ
        whole = tuple(json.dumps({**row, "origin": ""}, ensure_ascii=False, default=repr) for row in (one, other))
        texts = texts if whole[0] == whole[1] else (whole[0], whole[1])
    parting = 0 if texts[0] == texts[1] else max(0, _parting(*texts) - BEFORE)
    mine, theirs = (_escaped(("..." if parting else "") + text[parting:], EACH) for text in texts)
    return mine, theirs


def _parting(one: str, other: str) -> int:
    places = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(places, min(len(one), len(other)))


def excerpt(row: Row) -> str:
    """The beginning of what a row says."""
    return _escaped(_said(row))


def _said(row: Row) -> str:
    try:
        return identity(row).decode("utf-8", "replace")
    except (TypeError, ValueError):  # what there was of a record that could not be read
        return repr(dict(row))


def _escaped(text: str, most: int = EXCERPT) -> str:
    plain = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[: most + 1])
    return plain if len(plain) <= most else f"{plain[:most]}..."
