"""Rows with duplicates planted among them, and which they are; a little engine that runs stages over rows."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loomtune.contracts import Dropped, DuplicateStage, LinkStage, Row, RowStage, Stage

FILLERS = ("quickly", "big", "several", "today", "blue", "together", "maybe", "small", "often", "nice")


@dataclass
class Planted:
    """rows: what is prepared. Of each kind, the origins of what was planted."""

    rows: list[dict[str, Any]]
    exact: set[str] = field(default_factory=set)
    near: set[str] = field(default_factory=set)
    contaminated: set[str] = field(default_factory=set)


def planted(rows: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], seed: int = 0) -> Planted:
    """5 % of the rows copied, another 5 % with small edits, and held-out rows, half of them with another answer."""
    draw = random.Random(seed)
    base = [{**row, "origin": f"train.jsonl:{place}"} for place, row in enumerate(rows, 1)]
    share = len(base) // 20
    twice, edited = draw.sample(base, share), draw.sample(base, share)
    copies = [{**row, "origin": f"exact:{place}"} for place, row in enumerate(twice)]
    changed = [{**_edited(row, draw), "origin": f"near:{place}"} for place, row in enumerate(edited)]
    leaked = [{**row, "origin": f"leak:{place}"} for place, row in enumerate(held_out)]
    for row in leaked[::2]:
        row["completion"] = "I do not know."
    everything = [*copies, *changed, *leaked]
    draw.shuffle(everything)
    origins = [{str(row["origin"]) for row in part} for part in (copies, changed, leaked)]
    return Planted([*base, *everything], *origins)


def _edited(row: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """A row with one small edit of its prompt or its answer; with another number it would be another problem."""
    side = draw.choice(("prompt", "completion"))
    edits = (_reworded, _mistyped, _shouted if side == "prompt" else _repointed)
    while (text := draw.choice(edits)(row[side], draw)) == row[side]:
        pass  # two equal letters were swapped, or there are numbers alone
    return {**row, side: text}


def _reworded(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if not any(map(str.isdigit, word))]
    for _ in range(draw.choice((1, 2)) if places else 0):
        words[draw.choice(places)] = draw.choice(FILLERS)
    return " ".join(words)


def _mistyped(text: str, draw: random.Random) -> str:
    places = [place for place in range(len(text) - 1) if not any(map(str.isdigit, text[place : place + 2]))]
    place = draw.choice(places)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def _shouted(text: str, draw: random.Random) -> str:
    return draw.choice((text.upper(), text.replace(".", "!"), text.replace(", ", " ").capitalize()))


def _repointed(text: str, draw: random.Random) -> str:
    return draw.choice((text.replace(".", "!"), text.replace(", ", " ")))


def another_problem(row: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """A row in which one number of the prompt is another: alike in its words, and nobody's duplicate."""
    found = draw.choice([*re.finditer(r"\d+", row["prompt"])])
    start, end = found.span()
    return {**row, "prompt": f"{row['prompt'][:start]}{int(found[0]) + 1}{row['prompt'][end:]}"}


def pairs(stage: LinkStage, rows: Sequence[Row]) -> Iterator[tuple[int, int, float]]:
    """(earlier, later, how alike) of all pairs that meet and are alike, in the order of the later."""
    described = stage.describe(rows)
    found = _meeting(stage.keys(described), len(rows))
    for start in range(0, len(found), 50_000):
        one, other = found[start : start + 50_000].T
        alike = stage.alike(described[one], described[other])
        kept = alike >= stage.threshold
        yield from zip(one[kept].tolist(), other[kept].tolist(), alike[kept].tolist(), strict=True)


def _meeting(keys: Any, count: int) -> Any:
    if keys is None:
        earlier, later = np.triu_indices(count, 1)
    else:
        met = set[tuple[int, int]]()
        for column in keys.T:
            buckets = defaultdict[int, list[int]](list)
            for place, key in enumerate(column.tolist()):
                met.update((before, place) for before in buckets[key])
                buckets[key].append(place)
        if not met:
            return np.zeros((0, 2), int)
        earlier, later = np.array(sorted(met)).T
    order = np.lexsort((earlier, later))
    return np.stack([earlier[order], later[order]], axis=1)


def run(stage: Stage, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
    """(rows that stay, what went) of one stage."""
    if isinstance(stage, RowStage):
        judged = stage.apply(rows)
        return [one for one in judged if not isinstance(one, Dropped)], [
            one for one in judged if isinstance(one, Dropped)
        ]
    assert isinstance(stage, DuplicateStage)
    gone = dict[int, str]()
    for earlier, later, alike in pairs(stage, rows):
        if earlier not in gone and later not in gone:
            gone[later] = f"{alike:.2f} like {rows[earlier]['origin']}"
    kept = [row for place, row in enumerate(rows) if place not in gone]
    return kept, [Dropped(str(rows[place]["origin"]), stage.reason, why) for place, why in sorted(gone.items())]
