"""Signatures that estimate how alike two sets are, and keys under which alike ones meet.

Signatures are those of `rensa` (R-MinHash, after Dahlgaard, Knudsen and Thorup, "Fast Similarity Sketching", FOCS
2017), of which the lowest byte of each value is kept (b-bit minwise hashing, Li and König, WWW 2010). Bands: Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4. On GSM8K rensa is 30 times as fast as datasketch,
which computes text by text in numpy, and it needs no other library where datasketch needs scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.errors import UserError
from loomtune_plugins.stages.shingles import Numbers, mixed, runs

SEED = 20_000_601
CHANCE = 1 / 256
"""How often the lowest bytes of two different values agree."""


def bands(threshold: float, hashes: int, recall: float) -> tuple[int, int] | None:
    """(values of a band, bands): the longest bands, few of which must be tried, that find `recall` at the threshold."""
    for rows in range(hashes, 0, -1):
        missed = math.log1p(-(threshold**rows)) if threshold < 1 else -math.inf
        needed = max(1, math.ceil(math.log1p(-recall) / missed)) if missed else hashes + 1
        if rows * needed <= hashes:
            return rows, needed
    return None


def banded(threshold: float, hashes: int, recall: float, key: str) -> tuple[int, int]:
    """The same. Raises UserError where there are too few values."""
    if (found := bands(threshold, hashes, recall)) is None:
        what = f"{key}.hashes={hashes} cannot find {recall:.0%} of what is alike to {threshold}"
        raise UserError.of(what, f"set {key}.hashes=256")
    return found


def signatures(
    texts: Sequence[str], parted: Callable[[str], Numbers], size: int, hashes: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """`(texts, hashes)` of the runs of `size` neighbours of each text, and `(texts,)` how many of these there are."""
    made, counts = [np.zeros((0, hashes), np.uint8)], [np.zeros(0, np.uint64)]
    for numbers, offsets in runs(texts, parted, size):
        made.append(_signatures(numbers, offsets, hashes))
        counts.append(np.diff(offsets))
    return np.concatenate(made), np.concatenate(counts)


def signature(numbers: Numbers, hashes: int) -> NDArray[np.uint8]:
    """`(hashes,)` of one set of numbers."""
    return _signatures(numbers, np.array([0, len(numbers)], np.uint64), hashes).reshape(-1)


def _signatures(numbers: Numbers, offsets: NDArray[np.uint64], hashes: int) -> NDArray[np.uint8]:
    rows = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(numbers, offsets, hashes, SEED).to_rows()
    signatures: NDArray[np.uint8] = np.array(rows, np.uint32).astype(np.uint8).reshape(-1, hashes)
    return signatures


def similarity(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Estimated Jaccard similarity of signatures `(..., hashes)`."""
    agree = (one == other).mean(axis=-1, dtype=np.float32)
    estimate: NDArray[np.float32] = np.maximum((agree - CHANCE) / (1 - CHANCE), 0).astype(np.float32)
    return estimate


def keys(values: NDArray[np.uint8], salt: Numbers, rows: int, count: int) -> Numbers:
    """`(n, count)`: a key for each band of `rows` of the values `(n, hashes)`. salt: `(n,)`, what must be equal too."""
    banded = values[:, : rows * count].reshape(len(values), count, rows).astype(np.uint64)
    total = np.repeat(salt[:, None], count, axis=1)
    for place in range(rows):
        total = total * np.uint64(0x100000001B3) + banded[:, :, place] + np.uint64(1)
    return mixed(total)


@cache
def _rensa() -> Any:
    import rensa

    return rensa


def versions() -> Mapping[str, str]:
    """The library, whose values change between its versions."""
    return {"rensa": version("rensa")}
