"""Rows that a link compares by the very same: they are found by a digest, and go as one from then on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import LinkStage
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.parts import STATS, Generation
from loomtune_plugins.commands.prepare.shuffling import place_of, shuffled, sliced

EQUAL = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
"""A digest of what a row is compared by."""

COPY = np.dtype([("row", "<i8"), ("first", "<i8"), ("alike", "<f4")])
"""A row that equals an earlier one in everything that it is compared by."""

SOME = 8192
"""Rows whose descriptions are in memory at a time."""


def equals(folder: Path, described: NDArray[Any], count: int) -> None:
    """Leaves digests of what rows are compared by, in the order of buckets; rows are counted from the part's first."""
    flat = np.ascontiguousarray(described).view(np.uint8).reshape(len(described), -1)
    digests = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in flat)
    records = np.empty(len(flat), EQUAL)
    records["high"], records["low"] = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    records["row"] = np.arange(len(flat))
    shuffled(folder, "equal", records, records["high"], count)


def equal(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One bucket: which rows equal an earlier one, and are alike by what the link says of equal ones."""
    link, generation = work.link(task["pass"]), Generation.of(work.folder / f"rows-{task['pass'] + 1}")
    found = np.concatenate([np.empty(0, EQUAL), *_gathered(generation, "equal", task["bucket"])])
    found = found[np.lexsort((found["row"], found["low"], found["high"]))]
    same = np.zeros(len(found), bool)
    same[1:] = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
    begins = np.maximum.accumulate(np.where(same, 0, np.arange(len(found))))
    copies = np.empty(int(same.sum()), COPY)
    copies["row"], copies["first"] = found["row"][same], found["row"][begins[same]]
    copies["alike"] = _self_alike(link, generation, copies["first"])
    copies = copies[copies["alike"] >= link.threshold]
    np.save(folder / "copies.npy", copies[np.argsort(copies["row"])])
    (folder / STATS).write_text(json.dumps({"copies": len(copies)}))


def copies(work: Work, number: int, begin: int, end: int) -> NDArray[Any]:
    """The rows of a range that equal earlier ones, in order."""
    found = [np.empty(0, COPY)]
    for path in sorted((work.folder / f"equal-{number}").glob("[0-9]*/copies.npy")):
        there = np.load(path, mmap_mode="r")
        found.append(np.array(there[place_of(there, "row", begin) : place_of(there, "row", end)]))
    joined = np.concatenate(found)
    return joined[np.argsort(joined["row"])]


def singles(work: Work, number: int, generation: Generation, part: int) -> NDArray[np.int64]:
    """The rows of a part, counted from its first, that equal none before them."""
    first, end = generation.range(part)
    own = np.ones(end - first, bool)
    own[copies(work, number, first, end)["row"] - first] = False
    return np.flatnonzero(own)


def _gathered(generation: Generation, name: str, bucket: int) -> Iterator[NDArray[Any]]:
    for number, part in enumerate(generation.parts):
        if part["rows"]:
            records = sliced(generation.path(number), name, bucket)
            records["row"] += generation.range(number)[0]
            yield records


def _self_alike(link: LinkStage, generation: Generation, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """How alike rows are to themselves: some are to nothing, since there is nothing to compare."""
    each_once, back = np.unique(rows, return_inverse=True)
    alike = [np.empty(0, np.float32)]
    for begin in range(0, len(each_once), SOME):
        described = generation.take(each_once[begin : begin + SOME])
        alike.append(np.asarray(link.alike(described, described), np.float32))
    return np.concatenate(alike)[back]
