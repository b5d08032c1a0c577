"""Which rows go: of duplicates all but the first, of groups that hang together the training rows beside held-out ones.

Rows that the inputs held out, in a test or validation split of their own, stay whatever they are alike to: somebody
chose them, and scores count by them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import DuplicateStage, SplitStage
from loomtune_plugins.commands.prepare.comparing import pairs_of
from loomtune_plugins.commands.prepare.counts import excerpt
from loomtune_plugins.commands.prepare.equality import copies
from loomtune_plugins.commands.prepare.job import Work
from loomtune_plugins.commands.prepare.parts import STATS, Generation, read_json

SPLITS = ("test", "validation", "train")
"""In the order in which they are read: of duplicates the test's copy stays."""

KEPT = np.dtype([("like", "<i8"), ("alike", "<f4")])
"""like: the row that stays in the place of this one; -1: it stays itself."""

SOME = 1 << 16
"""Pairs, or rows, that are in memory at a time."""

_NONE = np.uint8(255)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a row: reason is empty where it stays. like: because of which row; alike: how much, if known."""

    reason: str = ""
    like: int = -1
    alike: float | None = None
    split: str = ""


def decide(work: Work, task: dict[str, Any], folder: Path) -> None:
    """Goes through all that is alike, once, in order."""
    number = task["pass"]
    generation = Generation.of(work.folder / f"rows-{number + 1}")
    pairs = [work.folder / task["pairs"] / str(place) for place in range(task["count"])]
    if isinstance(link := work.link(number), SplitStage):
        told = _split(work, number, generation, link, pairs, folder)
    else:
        told = _first(work, number, generation, pairs, folder)
    (folder / STATS).write_text(json.dumps(told))


def verdicts(work: Work, number: int, part: int) -> Sequence[Verdict]:
    """What was decided about the rows of a part, in order."""
    begin, end = Generation.of(work.folder / f"rows-{number + 1}").range(part)
    place, link = work.folder / f"decide-{number}" / "0", work.link(number)
    if not end:
        return ()
    if isinstance(link, DuplicateStage):
        return _duplicates(work, number, place, link, begin, end)
    names = read_json(place / STATS)["names"]
    splits = np.memmap(place / "splits.bin", np.uint8, mode="r")[begin:end].tolist()
    roots = np.memmap(place / "roots.bin", "<i8", mode="r")
    return [
        Verdict(f"alike to a row of {names[split - len(names)]}", int(roots[begin + row]))
        if split >= len(names)
        else Verdict(split=names[split])
        for row, split in enumerate(splits)
    ]


def _duplicates(work: Work, number: int, place: Path, link: DuplicateStage, begin: int, end: int) -> Sequence[Verdict]:
    """A copy goes with the row that it equals: in its favour, or with it in favour of a third."""
    kept = np.memmap(place / "kept.bin", KEPT, mode="r")
    own = _with_copies(work, number, Generation.of(work.folder / f"rows-{number + 1}"), kept, begin, end)
    return [Verdict(link.reason, like, alike) if like >= 0 else Verdict() for like, alike in own.tolist()]


def _with_copies(
    work: Work, number: int, generation: Generation, kept: NDArray[Any], begin: int, end: int
) -> NDArray[Any]:
    """What becomes of some rows, copies among them; KEPT."""
    own, copied = np.array(kept[begin:end]), copies(work, number, begin, end)
    copied = copied[copied["row"] >= held_out(generation)]
    theirs = kept[copied["first"]]
    stays = theirs["like"] < 0
    own["like"][copied["row"] - begin] = np.where(stays, copied["first"], theirs["like"])
    own["alike"][copied["row"] - begin] = np.where(stays, copied["alike"], theirs["alike"])
    return own


def held_out(generation: Generation) -> int:
    """How many rows come from a test or validation split of the inputs; they are the first."""
    return sum(part["rows"] for part in generation.parts if part["split"] != "train")


def _first(work: Work, number: int, generation: Generation, tasks: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Drops each training row that is alike to an earlier row that stays."""
    gone, held = bytearray((len(generation) + 7) // 8), held_out(generation)
    with (folder / "kept.bin").open("wb") as file:
        for path in tasks:
            begin, end = read_json(path / STATS)["range"]
            kept = np.zeros(end - begin, KEPT)
            kept["like"] = -1
            for later, earlier, alike in _each(pairs_of(path)):
                if later < held or gone[later >> 3] >> (later & 7) & 1 or gone[earlier >> 3] >> (earlier & 7) & 1:
                    continue
                gone[later >> 3] |= 1 << (later & 7)
                kept[later - begin] = earlier, alike
            file.write(kept.tobytes())
    return _swallowed(work, number, generation, folder)


def _swallowed(work: Work, number: int, generation: Generation, folder: Path) -> dict[str, Any]:
    """How many rows go, and for which one the most of them: one row that swallows hundreds is seldom what is meant."""
    if not (rows := len(generation)):
        return {"dropped": 0}
    kept, counts = np.memmap(folder / "kept.bin", KEPT, mode="r"), _mapped(folder / "swallowed.bin", "<u4", rows)
    for begin, end in _blocks(rows):
        like = _with_copies(work, number, generation, kept, begin, end)["like"]
        np.add.at(counts, like[like >= 0], 1)
    dropped = sum(int(counts[begin:end].sum(dtype=np.int64)) for begin, end in _blocks(rows))
    most = int(np.argmax(counts))
    (folder / "swallowed.bin").unlink()
    if not dropped:
        return {"dropped": 0}
    row = generation.row(most)
    return {
        "dropped": dropped,
        "most": {"rows": int(counts[most]), "origin": str(row.get("origin", "")), "excerpt": excerpt(row)},
    }


def _each(pairs: NDArray[Any]) -> Iterator[tuple[int, int, float]]:
    for begin in range(0, len(pairs), SOME):
        yield from pairs[begin : begin + SOME].tolist()


def _split(
    work: Work, number: int, generation: Generation, link: SplitStage, tasks: Sequence[Path], folder: Path
) -> dict[str, Any]:
    """Joins whatever is alike, and draws for each group by the least digest of its rows.

    Rows that have a split of their own keep it; training rows that hang together with held-out ones go.
    """
    rows = len(generation)
    if not rows:
        return {"names": [], "largest": 0, "asked": {}}
    roots = _mapped(folder / "roots.bin", "<i8", rows)
    for begin, end in _blocks(rows):
        roots[begin:end] = np.arange(begin, end)
        copied = copies(work, number, begin, end)
        roots[copied["row"]] = copied["first"]
    for path in tasks:
        for later, earlier, _ in _each(pairs_of(path)):
            _join(roots, later, earlier)
    least, sizes = _mapped(folder / "least.bin", "<u8", rows), _mapped(folder / "sizes.bin", "<i8", rows)
    for begin, end in _blocks(rows):
        least[begin:end] = np.iinfo(np.uint64).max
    _flatten(generation, roots, least, sizes)
    given = [part["split"] for part in generation.parts]
    drawn = {name: share for name, share in link.shares().items() if share > 0 and name not in _own(given)}
    names = list(dict.fromkeys([*_own(given), *drawn, *([] if drawn else ["train"])]))
    splits = _mapped(folder / "splits.bin", "u1", rows)
    own = np.array([names.index(split) if split in _own(given) else _NONE for split in given], np.uint8)
    held = held_out(generation)
    for begin, end in _blocks(rows):
        root = np.asarray(roots[begin:end])
        code, asked = (own[_part_of(generation, rows)] for rows in (np.arange(begin, end), root))
        places = np.searchsorted(_edges(drawn), np.asarray(least[root]) / 2.0**64, side="right")
        free = np.array([names.index(name) for name in drawn] or [names.index("train")], np.uint8)[places]
        stays = (np.arange(begin, end) < held) | (code == asked)
        splits[begin:end] = np.where(asked == _NONE, free, np.where(stays, code, asked + len(names)))
    largest = max(int(np.max(sizes[begin:end])) for begin, end in _blocks(rows))
    for name in ("least.bin", "sizes.bin"):
        (folder / name).unlink()
    return {"names": names, "largest": largest, "asked": drawn}


def _own(given: Sequence[str]) -> list[str]:
    """The splits that inputs have of their own: `train` alone is where rows are that have none."""
    found = [split for split in SPLITS if split in given]
    return found if len(found) == len(SPLITS) else [split for split in found if split != "train"]


def _edges(shares: dict[str, float]) -> NDArray[np.float64]:
    """Where one split ends and the next begins, of those that are drawn."""
    whole = sum(shares.values()) or 1.0
    return np.cumsum(list(shares.values()))[:-1] / whole if shares else np.empty(0)


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, rows, SOME):
        yield begin, min(begin + SOME, rows)


def _mapped(path: Path, kind: str, rows: int) -> NDArray[Any]:
    return np.memmap(path, kind, mode="w+", shape=(rows,))


def _part_of(generation: Generation, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(generation.bases, rows, side="right") - 1


def _join(roots: NDArray[np.int64], one: int, other: int) -> None:
    """Under the first row of both groups; what is passed on the way is moved nearer to it."""
    one, other = _root(roots, one), _root(roots, other)
    if one != other:
        roots[max(one, other)] = min(one, other)


def _root(roots: NDArray[np.int64], row: int) -> int:
    while (above := int(roots[row])) != row:
        roots[row] = roots[above]
        row = above
    return row


def _flatten(
    generation: Generation, roots: NDArray[np.int64], least: NDArray[np.uint64], sizes: NDArray[np.int64]
) -> None:
    """Leads every row to its group's first one at once, where the least digest and the number of rows are gathered."""
    for begin, end in _blocks(len(generation)):  # roots come before their rows, so that earlier blocks are done
        block = np.asarray(roots[begin:end])
        while np.any((above := np.asarray(roots[block])) != block):
            roots[begin:end] = block = above
    for number in range(len(generation.parts)):
        begin, end = generation.range(number)
        if begin < end:
            digests = np.load(generation.path(number) / "digests.npy")
            root = np.asarray(roots[begin:end])
            np.minimum.at(least, root, digests)
            np.add.at(sizes, root, 1)
