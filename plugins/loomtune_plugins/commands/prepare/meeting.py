"""How rows that may be alike are found: they share a key, in the same of a link's columns of keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune_plugins.commands.prepare.equality import singles
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.parts import STATS, Generation
from loomtune_plugins.commands.prepare.shuffling import mixed, shuffled, sliced

MET = np.dtype([("key", "<u8"), ("row", "<i8")])
CANDIDATES = np.dtype([("later", "<i8"), ("earlier", "<i8")])

FIRST = 100
"""With how many of the rows before it that share a key a row is compared: the first ones."""

RUN = 1 << 20
"""Candidates that are sorted at a time."""

RUNS = "runs.npy"


def keys(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One part: the keys of its rows, without the copies."""
    link, number, part = work.link(task["pass"]), task["pass"], task["part"]
    generation = Generation.of(work.folder / f"rows-{number + 1}")
    rows = singles(work, number, generation, part)
    given = link.keys(np.asarray(generation.described(part)[rows])) if len(rows) else None
    columns = 0 if given is None else given.shape[1]
    records = np.empty(len(rows) * columns, MET)
    if given is not None:
        salts = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        records["key"] = mixed(given.astype(np.uint64) ^ mixed(salts)[None]).ravel()
        records["row"] = np.repeat(rows + generation.range(part)[0], columns)
    shuffled(folder, "keys", records, records["key"], task["buckets"])
    (folder / STATS).write_text("{}")


def meet(work: Work, task: dict[str, Any], folder: Path) -> None:
    """One bucket: which rows share a key, in runs that are sorted by the later one."""
    place = work.folder / f"keys-{task['pass']}"
    parts = sorted(int(path.name) for path in place.iterdir() if path.name.isdigit())
    slices = [sliced(place / str(part), "keys", task["bucket"]) for part in parts]
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
