"""Where samples are kept: made once, whatever process asks for them and whenever one dies."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from loomtune.errors import UserError
from loomtune.samples.crew import Crew
from loomtune.samples.making import Rows, Source, fill
from loomtune.samples.stored import ABOUT, COLUMNS, Samples, is_written, writable

SETTLED = 1.0
"""Seconds after which a change of a file shows in its times, however coarse the file system's clock is."""

_UNFINISHED = ".unfinished-"
_ABANDONED = 7 * 24 * 3600.0
"""Seconds after which nobody fills a folder any more."""


def default_cache() -> Path:
    """Where samples are kept: `$LOOMTUNE_CACHE`, or `~/.cache/loomtune/samples`."""
    named = os.environ.get("LOOMTUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "loomtune" / "samples"


def open_samples(cache: Path, key: str) -> Samples:
    """Samples that `prepare` made. Raises UserError where they are gone, or files are not of the size they had."""
    try:
        return Samples(cache / key)
    except (OSError, ValueError, KeyError) as error:
        raise UserError.of(
            f"the tokenised samples in {cache / key} cannot be read: {error}",
            "start the run again, which makes them anew; every rank must see the folder that LOOMTUNE_CACHE names",
        ) from error


def of_run(folder: Path) -> dict[str, Samples]:
    """A run's samples by split, which were tokenised before any process of it existed."""
    placed = json.loads((folder / "samples.json").read_text())
    return {split: open_samples(Path(place["cache"]), place["key"]) for split, place in placed.items()}


def prepare(source: Source, cache: Path, vocabulary: int) -> Samples:
    """The samples of a split, or of its first window, from the cache or made now, beside whoever makes the same.

    vocabulary: every token id must be smaller.
    Raises UserError, which names rows, for rows that the objective refuses or that have no target, for token ids that
    the model does not have, for a training split without rows, and where the cache cannot be written to.
    """
    folder = cache / source.key
    if kept(folder) is None:
        with writable(cache):
            making = _temporary(cache)
        try:
            with closing(Crew(source.encoder)) as crew:
                fill(making, source, Rows(source), crew.parts)
            with writable(cache):
                _publish(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    samples = open_samples(cache, source.key)
    if source.split == "train" and not len(samples):
        raise UserError.of("split train has no rows to learn from", "check data.path, data.limit and data.holdout")
    check_tokens(samples, vocabulary)
    return samples


def check_tokens(samples: Samples, vocabulary: int) -> None:
    """Raises UserError where there is a token id that is none of so many."""
    if (largest := samples.largest_token) < vocabulary:
        return
    where = next(i for i in range(len(samples)) if any((s.tokens >= vocabulary).any() for s in samples[i].segments))
    raise UserError.of(
        f"the tokenizer gives token {largest} (first too large in {samples.origin(where)}), but the "
        f"model has {vocabulary} embeddings: they do not belong together",
        "give model.path a folder whose tokenizer belongs to its weights",
    )


def kept(folder: Path) -> Samples | None:
    """The samples of a folder, if there is one and every byte is as it was written.

    All bytes are read where any file was written to, or put there, since they were last found right: the file system
    keeps the time, and what it does not notice (a disk that forgets) is not noticed here.
    """
    seen = folder / "seen.json"
    try:
        samples, states = Samples(folder), [_state(folder / name) for name in (*COLUMNS, ABOUT)]
        now = json.dumps(states)
        if seen.is_file() and seen.read_text() == now:
            return samples
        if not is_written(folder):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if time.time_ns() - max(changed for *_, changed in states) > SETTLED * 1e9:
        with suppress(OSError):
            seen.write_text(now)
    return samples


def _state(path: Path) -> list[int]:
    """What changes where a file does: nothing sets back the time of its last change."""
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_ctime_ns]


def _publish(made: Path, final: Path) -> None:
    """Gives a finished folder its name. Where another process was quicker and its work is whole, ours is dropped."""
    with _locked(final.parent):
        if kept(final) is None:
            if os.path.lexists(final):
                aside = final.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
                final.rename(aside)
                _remove(aside)
            made.rename(final)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among processes, where the file system can do that; elsewhere a rename is all there is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _temporary(cache: Path) -> Path:
    """A new folder of this process alone; those that killed processes left long ago are removed."""
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                _remove(left)
    folder = cache / f"{_UNFINISHED}{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
