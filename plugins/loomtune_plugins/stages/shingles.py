"""Runs of characters or of words, as 64-bit numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loomtune_plugins.stages.said import digest

Numbers = NDArray[np.uint64]

BLOCK = 1 << 18
"""Characters that are hashed at once: they stay in the processor's cache, and memory does not grow with the rows."""

INDENTED = 0xF0000
"""Characters of private use, from here on, stand for depths of indentation."""

WORD = re.compile(
    # Scripts that put no blanks between words: each of their characters is one.
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


def folded(text: str, form: Literal["NFC", "NFKC"] = "NFKC") -> str:
    """The text without what readers overlook: capitals, blanks, by NFKC widths of letters too."""
    return " ".join(unicodedata.normalize(form, text).casefold().split())


def laid(text: str) -> str:
    """The text as it is laid out, so that code stays what it says: only blanks within and behind lines are evened.

    Indentation is one character, another for each depth: of a set of runs, none would be new for four more blanks.
    """
    return "\n".join(map(_evened, unicodedata.normalize("NFC", text).split("\n")))


def _evened(line: str) -> str:
    body = line.lstrip()
    depth = len(line[: len(line) - len(body)].expandtabs())
    return (chr(INDENTED + min(depth, 0xFFF)) if body and depth else "") + " ".join(body.split())


def words(text: str) -> list[str]:
    """The words of a text, folded, without punctuation; a character each of scripts that write no blanks."""
    return WORD.findall(folded(text))


def mixed(numbers: Numbers) -> Numbers:
    """Numbers made to look random, one to one: splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def characters_of(text: str, change: Callable[[str], str] = folded) -> Numbers:
    """The characters of a text, changed so first."""
    return np.frombuffer(change(text).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)


def words_of(text: str) -> Numbers:
    """The words of a text as digests."""
    found = words(text)
    return np.fromiter(map(_word, found), np.uint64, len(found))


def runs(
    texts: Sequence[str], parted: Callable[[str], Numbers], size: int
) -> Iterator[tuple[Numbers, NDArray[np.uint64]]]:
    """Of some texts at a time, `size` neighbours each as one number: (all numbers, where each text's begin and end).

    As many as there are characters (or words): the last reach over the end, so that short texts have some too.
    """
    ends = np.cumsum([len(text) for text in texts])
    start = 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        yield _runs([parted(text) for text in texts[start:stop]], size)
        start = stop


def _runs(texts: Sequence[Numbers], size: int) -> tuple[Numbers, NDArray[np.uint64]]:
    end = np.zeros(size - 1, np.uint64)
    flat = np.concatenate([part for text in texts for part in (text + np.uint64(1), end)])
    lengths = np.array([len(text) for text in texts], np.int64)
    hashed = np.empty(len(flat) - size + 1, np.uint64)
    for start in range(0, len(hashed), BLOCK):
        hashed[start : start + BLOCK] = hashed_runs(flat[start : start + BLOCK + size - 1], size)
    ends = np.cumsum(lengths + size - 1)
    inside = np.ones(len(hashed), bool)
    for stop in ends[:-1]:
        inside[stop - size + 1 : stop] = False
    return hashed[inside], np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def hashed_runs(numbers: Numbers, size: int) -> Numbers:
    """`(n - size + 1,)`: each run of `size` neighbours as one number, a polynomial of them, mixed."""
    count = len(numbers) - size + 1
    total = np.zeros(count, np.uint64)
    for place in range(size):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += numbers[place : place + count]
    return mixed(total)


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> int:
    return digest(word)
