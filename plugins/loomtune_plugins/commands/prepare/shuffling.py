"""Records on disk, in the order of buckets: what has the same hash meets in one task, whichever part it is of."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUCKET = 32 << 20
"""Bytes of records that meet in one task, about."""


def buckets(records: int, size: int) -> int:
    """Into how many parts records of so many bytes are shuffled: a power of two, since bits of a hash decide."""
    return 1 << max(0, (max(1, -(-records * size // BUCKET)) - 1).bit_length())


def shuffled(folder: Path, name: str, records: NDArray[Any], hashes: NDArray[np.uint64], count: int) -> None:
    """Saves records in the order of buckets, and where each bucket begins."""
    bits = count.bit_length() - 1
    bucket = hashes >> np.uint64(64 - bits) if bits else np.zeros(len(records), np.uint64)
    np.save(folder / f"{name}.npy", records[np.argsort(bucket, kind="stable")])
    starts = np.concatenate([[0], np.cumsum(np.bincount(bucket.astype(np.int64), minlength=count))])
    np.save(folder / f"{name}-starts.npy", starts)


def sliced(folder: Path, name: str, bucket: int) -> NDArray[Any]:
    """The records of a part that fall into a bucket."""
    starts = np.load(folder / f"{name}-starts.npy", mmap_mode="r")
    return np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[starts[bucket] : starts[bucket + 1]])


def mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """A file of records, without reading them."""
    if not path.stat().st_size:  # nothing cannot be mapped
        return np.empty(0, kind)
    return np.memmap(path, kind, mode="r")


def place_of(records: NDArray[Any], name: str, value: int) -> int:
    """Where a value would stand in mapped records that are sorted by it, without reading them all."""
    return bisect_left(records, value, key=lambda record: int(record[name]))


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result hangs on every bit given (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
