"""Which rows are alike: of those that met, or of each with each where a link has no keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import LinkStage
from loomtune_plugins.commands.prepare.equality import singles
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.meeting import CANDIDATES, RUNS
from loomtune_plugins.commands.prepare.parts import STATS, Generation
from loomtune_plugins.commands.prepare.shuffling import mapped, place_of

PAIR = np.dtype([("later", "<i8"), ("earlier", "<i8"), ("alike", "<f4")])

ROWS, COMPARED, BLOCK, BLOCKS = 2048, 8192, 512, 1024
"""Rows whose candidates, and pairs whose descriptions, are in memory at a time; both of those without keys."""


def compare(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One part: which of the candidates are alike, sorted by the later row and then the earlier."""
    number, part = task["pass"], task["part"]
    generation, link = Generation.of(work.folder / f"rows-{number + 1}"), work.link(number)
    first, end = generation.range(part)
    met = list(_runs(work.folder / f"meet-{number}"))
    with (folder / "pairs.bin").open("wb") as file:
        for begin in range(first, end, ROWS):
            stop = min(begin + ROWS, end)
            for pairs in _alike(link, generation, _of_rows(met, begin, stop)):
                file.write(pairs.tobytes())
    (folder / STATS).write_text(json.dumps({"range": [first, end]}))


def each(work: Work, task: dict[str, Any], folder: Path) -> None:
    """Some rows of a part, each compared with all before it: what `compare` does where there are no keys."""
    number, part = task["pass"], task["part"]
    generation, link = Generation.of(work.folder / f"rows-{number + 1}"), work.link(number)
    base, (begin, end) = generation.range(part)[0], task["rows"]
    own = singles(work, number, generation, part)
    own = own[(own >= begin) & (own < end)]
    with (folder / "pairs.bin").open("wb") as file:
        for later in np.array_split(own, max(1, -(-len(own) // BLOCK))):
            found = [np.empty(0, PAIR), *_against(work, number, generation, link, part, later)]
            pairs = np.concatenate(found)
            file.write(pairs[np.lexsort((pairs["earlier"], pairs["later"]))].tobytes())
    (folder / STATS).write_text(json.dumps({"range": [base + begin, base + end]}))


def pairs_of(path: Path) -> NDArray[Any]:
    """The pairs of a task, mapped from the disk."""
    return mapped(path / "pairs.bin", PAIR)


def _runs(folder: Path) -> Iterator[NDArray[Any]]:
    """The runs of all buckets."""
    for path in sorted(folder.glob("[0-9]*")):
        candidates = mapped(path / "candidates.bin", CANDIDATES)
        for begin, end in pairwise(np.load(path / RUNS).tolist()):
            yield candidates[begin:end]


def _of_rows(runs: list[NDArray[Any]], begin: int, end: int) -> NDArray[Any]:
    """The candidates of some later rows, each once."""
    found = [run[place_of(run, "later", begin) : place_of(run, "later", end)] for run in runs]
    joined = np.concatenate([np.empty(0, CANDIDATES), *found])
    packed = np.unique((joined["later"] - begin) << 48 | joined["earlier"])
    once = np.empty(len(packed), CANDIDATES)
    once["later"], once["earlier"] = (packed >> 48) + begin, packed & ((1 << 48) - 1)
    return once


def _alike(link: LinkStage, generation: Generation, candidates: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for begin in range(0, len(candidates), COMPARED):
        some = candidates[begin : begin + COMPARED]
        alike = np.asarray(link.alike(generation.take(some["later"]), generation.take(some["earlier"])), np.float32)
        yield _pairs(some["later"], some["earlier"], alike, link.threshold)


def _pairs(later: NDArray[Any], earlier: NDArray[Any], alike: NDArray[Any], threshold: float) -> NDArray[Any]:
    enough = alike >= threshold
    made = np.empty(int(enough.sum()), PAIR)
    made["later"], made["earlier"], made["alike"] = later[enough], earlier[enough], alike[enough]
    return made


def _against(
    work: Work, number: int, generation: Generation, link: LinkStage, part: int, later: NDArray[np.int64]
) -> Iterator[NDArray[Any]]:
    """Pairs of some rows of a part with those before them, block by block. Without keys, that is."""
    if not len(later):
        return
    mine = np.asarray(generation.described(part)[later])
    for other in range(part + 1):
        base = generation.range(other)[0]
        theirs = singles(work, number, generation, other)
        for begin in range(0, len(theirs), BLOCKS):
            earlier = theirs[begin : begin + BLOCKS]
            alike = np.asarray(link.table(mine, np.asarray(generation.described(other)[earlier])), np.float32)
            ones, others = np.nonzero(alike >= link.threshold)
            before = (earlier[others] + base) < (later[ones] + generation.range(part)[0])
            ones, others = ones[before], others[before]
            lefts, rights = later[ones] + generation.range(part)[0], earlier[others] + base
            yield _pairs(lefts, rights, alike[ones, others], link.threshold)
