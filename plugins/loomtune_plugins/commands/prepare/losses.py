"""What of a preparation looks like a loss that nobody meant: said aloud, since a table of counts is soon read over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MUCH = 0.1
"""Of the rows that come to a link: more that it drops is told."""

MANY, SHARE = 50, 0.01
"""Rows, and their share, that went for a single one: more is told, since templates look like duplicates."""

FAR = 2.0
"""How many times more or less than was asked for a split's share may be."""


def warnings(stages: Sequence[Mapping[str, Any]], splits: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Everything that somebody should look at: what, and the cure."""
    found = [*_losses(stages), *_held(stages), *_shares(stages, splits)]
    return [{"what": what, "cure": cure} for what, cure in found]


def _losses(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for stage in stages:
        if "found" not in stage or not stage["in"]:
            continue
        lost, most = stage["in"] - stage["out"], stage["found"].get("most", {"rows": 0})
        swallowed = most["rows"] > MANY and most["rows"] > SHARE * stage["in"]
        if lost > MUCH * stage["in"] or swallowed:
            what = f"stage={stage['name']} dropped {lost / stage['in']:.1%} of its {stage['in']:,} rows"
            for_one = f", {most['rows']:,} of them for one row ({most.get('origin')}: {most.get('excerpt')})"
            yield what + (for_one if most["rows"] > 1 else ""), _cure(stage)


def _cure(stage: Mapping[str, Any]) -> str:
    name, settings = stage["name"], stage["settings"]
    closer = [f"{key} (now {settings[key]})" for key in ("threshold", "similar") if settings.get(key) is not None]
    raised = f"raise stage.{name}.{closer[0]}, " if closer else ""
    return f"look at them with --dropped; if they are no copies, {raised}or leave {name} out of stage=[...]"


def _held(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for stage in stages:
        for split, of in stage.get("held", {}).items():
            done = " and ".join(f"{what} {rows:,}" for what, rows in sorted(of.items(), reverse=True))
            what = f"stage={stage['name']} {done} rows of {split}, which the inputs held out"
            yield what, f"if scores must compare with others', prepare without {stage['name']}, or without {split}"


def _shares(stages: Sequence[Mapping[str, Any]], splits: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    largest = next((stage["found"]["largest"] for stage in stages if stage.get("found", {}).get("largest")), 1)
    for split, of in splits.items():
        if of.get("asked") and not of["asked"] / FAR <= of["actual"] <= of["asked"] * FAR:
            groups = f"; up to {largest:,} rows hang together and go as one" if largest > 1 else ""
            what = f"{split} has {of['actual']:.1%} of the rows, and {of['asked']:.1%} was asked for{groups}"
            yield (
                what,
                "give more rows or another seed, or let fewer rows hang together (settings of the splitting stage)",
            )
