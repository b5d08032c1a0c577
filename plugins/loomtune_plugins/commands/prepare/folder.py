"""The folder that is prepared into: who may write there, and when what is there counts."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loomtune.errors import UserError
from loomtune_plugins.commands.prepare.job import FILE, Job
from loomtune_plugins.commands.prepare.manifest import NAME, differences, intact, key_of
from loomtune_plugins.commands.prepare.parts import sync, write_json

WORK = ".work"
_OURS = re.compile(r"(train|validation|test)-\d{5,}\.jsonl|dropped\.ndjson|page-\w+\.md")
_LOCK = "lock"
_MARK = "published.json"


def refuse_others(out: Path) -> None:
    """Raises UserError where the folder holds what preparing did not write."""
    if out.exists() and not out.is_dir():
        raise UserError.of(f"--out {out} is a file", "name a folder, or a path where one can be made")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    begun = bool(names & {NAME, WORK})
    if strange := sorted(name for name in names if name not in (NAME, WORK) and not (begun and _OURS.fullmatch(name))):
        told = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise UserError.of(f"--out {out} holds something else: {told}", "name an empty or new folder")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """While this process prepares, no other does. Raises UserError where one is at it."""
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        lock = (out / WORK / _LOCK).open("a")
    except OSError as error:
        raise UserError.of(f"--out {out} cannot be written into: {error}", "name a folder of your own") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError.of(f"{out} is being prepared by another process", "wait for it, or name another") from error
        try:
            yield
        finally:
            _leave_nothing(out)


def _leave_nothing(out: Path) -> None:
    """Takes the folder of the work away where nothing was begun in it, or all is done."""
    with contextlib.suppress(OSError):
        if [path.name for path in (out / WORK).iterdir()] == [_LOCK]:
            (out / WORK / _LOCK).unlink()
            (out / WORK).rmdir()


def is_prepared(out: Path, job: Job) -> bool:
    """Whether the very same is there, whole. Raises UserError where something else was prepared there."""
    if (out / NAME).exists() and key_of(out) != job.key:
        found = differences(out, job)
        only = "only " if all(one.startswith("--") for one in found) else ""
        what = f"--out {out} holds another preparation: it differs {only}in {'; '.join(found)}"
        raise UserError.of(what, "name another folder, or delete that one")
    return intact(out, job.key)


def begun(out: Path, job: Job) -> Path:
    """The folder of the work, as far as it went; that of another job goes away."""
    folder = out / WORK / job.key[:16]
    for other in (out / WORK).iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    write_json(folder / FILE, asdict(job))  # anew, for the paths by which the same data are found may be others now
    return folder


def publish(out: Path, folder: Path, files: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> None:
    """Puts the files into their places, and the manifest last; from then on they count.

    folder: of the work. files: name, and `place` in the work folder. A kill in the middle is made good by another call.
    """
    if not (folder / _MARK).exists():
        (out / NAME).unlink(missing_ok=True)
        for path in out.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        sync(out)
        write_json(folder / _MARK, {})
    for file in files:
        if (made := folder / file["place"] / file["name"]).exists():
            made.rename(out / file["name"])
    sync(out)
    write_json(out / NAME, manifest)


def tidy(out: Path) -> None:
    """Takes the work away, as far as that may be: what is prepared counts without."""
    shutil.rmtree(out / WORK, ignore_errors=True)
