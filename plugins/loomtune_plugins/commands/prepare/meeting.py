"""How rows that a link finds alike are found: equal ones by digest, others where they share a key, or each with each.

Every array lies on the disk; a task has a bucket, or a block, of it in memory. Rows are counted through all parts.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import LinkStage
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.parts import STATS, Generation

EQUAL = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
"""A digest of what a row is compared by."""

COPY = np.dtype([("row", "<i8"), ("first", "<i8"), ("alike", "<f4")])
"""A row that equals an earlier one in everything that it is compared by."""

MET = np.dtype([("key", "<u8"), ("row", "<i8")])
CANDIDATES = np.dtype([("later", "<i8"), ("earlier", "<i8")])
PAIR = np.dtype([("later", "<i8"), ("earlier", "<i8"), ("alike", "<f4")])

BUCKET = 32 << 20
"""Bytes of records that meet in one task, about."""

FIRST = 100
"""With how many of the rows before it that share a key a row is compared: the first ones."""

RUN = 1 << 20
"""Candidates that are sorted at a time."""

ROWS, COMPARED, BLOCK, BLOCKS = 2048, 8192, 512, 1024
"""Rows whose candidates, and pairs whose descriptions, are in memory at a time; both of those without keys."""

RUNS = "runs.npy"


def buckets(records: int, size: int) -> int:
    """Into how many parts records of so many bytes are shuffled: a power of two, since bits of a hash decide."""
    return 1 << max(0, (max(1, -(-records * size // BUCKET)) - 1).bit_length())


def equals(folder: Path, described: NDArray[Any], count: int) -> None:
    """Leaves digests of what rows are compared by, in the order of buckets; rows are counted from the part's first."""
    flat = np.ascontiguousarray(described).view(np.uint8).reshape(len(described), -1)
    digests = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in flat)
    records = np.empty(len(flat), EQUAL)
    records["high"], records["low"] = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    records["row"] = np.arange(len(flat))
    _shuffled(folder, "equal", records, records["high"], count)


def equal(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One bucket: which rows equal an earlier one, and are alike by what the link says of equal ones."""
    link, generation = work.link(task["pass"]), Generation.of(work.folder / f"rows-{task['pass'] + 1}")
    found = np.concatenate([np.empty(0, EQUAL), *_bucket(generation, "equal", task["bucket"])])
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


def keys(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One part: the keys of its rows, without the copies."""
    link, number, part = work.link(task["pass"]), task["pass"], task["part"]
    generation = Generation.of(work.folder / f"rows-{number + 1}")
    rows = _singles(work, number, generation, part)
    given = link.keys(np.asarray(generation.described(part)[rows])) if len(rows) else None
    columns = 0 if given is None else given.shape[1]
    records = np.empty(len(rows) * columns, MET)
    if given is not None:
        salts = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        records["key"] = _mixed(given.astype(np.uint64) ^ _mixed(salts)[None]).ravel()
        records["row"] = np.repeat(rows + generation.range(part)[0], columns)
    _shuffled(folder, "keys", records, records["key"], task["buckets"])
    (folder / STATS).write_text("{}")


def meet(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One bucket: which rows share a key, in runs that are sorted by the later one."""
    place = work.folder / f"keys-{task['pass']}"
    parts = sorted(int(path.name) for path in place.iterdir() if path.name.isdigit())
    slices = [_slice(place / str(part), "keys", task["bucket"]) for part in parts]
    met = np.concatenate([np.empty(0, MET), *slices])
    met = met[np.lexsort((met["row"], met["key"]))]
    fresh = np.ones(len(met), bool)
    fresh[1:] = met["key"][1:] != met["key"][:-1]
    begins = np.maximum.accumulate(np.where(fresh, np.arange(len(met)), 0))
    place_in_group = np.arange(len(met)) - begins
    runs = [0]
    with (folder / "candidates.bin").open("wb") as file:
        for run in _candidates(met["row"], begins, np.minimum(place_in_group, FIRST)):
            file.write(run.tobytes())
            runs.append(runs[-1] + len(run))
    np.save(folder / RUNS, np.array(runs, np.int64))
    cut = place_in_group > FIRST
    (folder / STATS).write_text(json.dumps({"keys": len(np.unique(begins[cut])), "rows": int(cut.sum())}))


def compare(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One part: which of the candidates are alike, sorted by the later row and then the earlier."""
    number, part = task["pass"], task["part"]
    generation, link = Generation.of(work.folder / f"rows-{number + 1}"), work.link(number)
    first, end = generation.range(part)
    met = list(_mapped(work.folder / f"meet-{number}"))
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
    own = _singles(work, number, generation, part)
    own = own[(own >= begin) & (own < end)]
    with (folder / "pairs.bin").open("wb") as file:
        for later in np.array_split(own, max(1, -(-len(own) // BLOCK))):
            found = [np.empty(0, PAIR), *_against(work, number, generation, link, part, later)]
            pairs = np.concatenate(found)
            file.write(pairs[np.lexsort((pairs["earlier"], pairs["later"]))].tobytes())
    (folder / STATS).write_text(json.dumps({"range": [base + begin, base + end]}))


def copies(work: Work, number: int, begin: int, end: int) -> NDArray[Any]:
    """The rows of a range that equal earlier ones, in order."""
    found = [np.empty(0, COPY)]
    for path in sorted((work.folder / f"equal-{number}").glob("[0-9]*/copies.npy")):
        there = np.load(path, mmap_mode="r")
        found.append(np.array(there[_place(there, "row", begin) : _place(there, "row", end)]))
    joined = np.concatenate(found)
    return joined[np.argsort(joined["row"])]


def pairs_of(path: Path) -> NDArray[Any]:
    """The pairs of a task, mapped from the disk."""
    return _array(path / "pairs.bin", PAIR)


def _array(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    if not path.stat().st_size:  # nothing cannot be mapped
        return np.empty(0, kind)
    return np.memmap(path, kind, mode="r")


def _place(records: NDArray[Any], name: str, value: int) -> int:
    """Where a value would stand in mapped records that are sorted by it, without reading them all."""
    return bisect_left(records, value, key=lambda record: int(record[name]))


def _shuffled(folder: Path, name: str, records: NDArray[Any], hashes: NDArray[np.uint64], count: int) -> None:
    """Saves records in the order of buckets, and where each bucket begins."""
    bits = count.bit_length() - 1
    bucket = hashes >> np.uint64(64 - bits) if bits else np.zeros(len(records), np.uint64)
    np.save(folder / f"{name}.npy", records[np.argsort(bucket, kind="stable")])
    starts = np.concatenate([[0], np.cumsum(np.bincount(bucket.astype(np.int64), minlength=count))])
    np.save(folder / f"{name}-starts.npy", starts)


def _slice(folder: Path, name: str, bucket: int) -> NDArray[Any]:
    starts = np.load(folder / f"{name}-starts.npy", mmap_mode="r")
    return np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[starts[bucket] : starts[bucket + 1]])


def _bucket(generation: Generation, name: str, bucket: int) -> Iterator[NDArray[Any]]:
    for number, part in enumerate(generation.parts):
        if part["rows"]:
            records = _slice(generation.path(number), name, bucket)
            records["row"] += generation.range(number)[0]
            yield records


def _self_alike(link: LinkStage, generation: Generation, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """How alike rows are to themselves: some are to nothing, since there is nothing to compare."""
    each_once, back = np.unique(rows, return_inverse=True)
    alike = [np.empty(0, np.float32)]
    for begin in range(0, len(each_once), COMPARED):
        described = generation.take(each_once[begin : begin + COMPARED])
        alike.append(np.asarray(link.alike(described, described), np.float32))
    return np.concatenate(alike)[back]


def _singles(work: Work, number: int, generation: Generation, part: int) -> NDArray[np.int64]:
    """The rows of a part, counted from its first, that equal none before them."""
    first, end = generation.range(part)
    own = np.ones(end - first, bool)
    own[copies(work, number, first, end)["row"] - first] = False
    return np.flatnonzero(own)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result hangs on every bit given (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _candidates(
    rows: NDArray[np.int64], begins: NDArray[np.int64], counts: NDArray[np.int64]
) -> Iterator[NDArray[Any]]:
    """Each record with the first `counts` of its group, which begins at `begins`, in runs of bounded size."""
    sums = np.concatenate([[0], np.cumsum(counts)])
    begin = 0
    while begin < len(rows):
        end = max(begin + 1, int(np.searchsorted(sums, sums[begin] + RUN, side="right")) - 1)
        some = counts[begin:end]
        within = np.arange(int(some.sum())) - np.repeat(sums[begin:end] - sums[begin], some)
        run = np.empty(len(within), CANDIDATES)
        run["later"] = np.repeat(rows[begin:end], some)
        run["earlier"] = rows[np.repeat(begins[begin:end], some) + within]
        if len(run):
            yield run[np.lexsort((run["earlier"], run["later"]))]
        begin = end


def _mapped(folder: Path) -> Iterator[NDArray[Any]]:
    """The runs of all buckets."""
    for path in sorted(folder.glob("[0-9]*")):
        candidates = _array(path / "candidates.bin", CANDIDATES)
        for begin, end in pairwise(np.load(path / RUNS).tolist()):
            yield candidates[begin:end]


def _of_rows(runs: list[NDArray[Any]], begin: int, end: int) -> NDArray[Any]:
    """The candidates of some later rows, each once."""
    found = [run[_place(run, "later", begin) : _place(run, "later", end)] for run in runs]
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
        theirs = _singles(work, number, generation, other)
        for begin in range(0, len(theirs), BLOCKS):
            earlier = theirs[begin : begin + BLOCKS]
            alike = np.asarray(link.table(mine, np.asarray(generation.described(other)[earlier])), np.float32)
            ones, others = np.nonzero(alike >= link.threshold)
            before = (earlier[others] + base) < (later[ones] + generation.range(part)[0])
            ones, others = ones[before], others[before]
            lefts, rights = later[ones] + generation.range(part)[0], earlier[others] + base
            yield _pairs(lefts, rights, alike[ones, others], link.threshold)
