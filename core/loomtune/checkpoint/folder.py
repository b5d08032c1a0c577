"""The folder of a run's checkpoints: what in it counts, which is the newest and the best, and what is cleared away.

A name is taken by one rename, when all that it names is on the disk. A step saved again (after a roll-back) never
overwrites: the old folder steps aside as `step-N.old`, which still counts until the new one has its name.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from loomtune.checkpoint.files import digest, replace_text
from loomtune.checkpoint.manifest import Manifest
from loomtune.errors import CheckpointError

FOLDER = re.compile(r"step-(\d{8,})(\.old)?")


def name_of(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    return f"step-{step:08d}"


def validate(path: Path, *, deep: bool = False) -> Manifest:
    """The manifest, if all of its files are there in the right size. deep: also compares every file's sha256.

    Raises CheckpointError naming the file and the cure.
    """
    manifest = Manifest.read(path)
    for name, file in manifest.files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing{cure(path)}")
        if (size := (path / name).stat().st_size) != file.bytes:
            raise CheckpointError(f"{path / name} has {size} bytes instead of {file.bytes}{cure(path)}")
        if deep:
            verify(path, name, manifest)
    return manifest


def verify(path: Path, name: str, manifest: Manifest) -> None:
    """Raises CheckpointError where a file is not, bit for bit, the one that was written."""
    if digest(path / name) != manifest.files[name]:
        raise CheckpointError(f"{path / name} is damaged: its sha256 is not the manifest's{cure(path)}")


def cure(path: Path) -> str:
    """What to do about a checkpoint that cannot be trusted."""
    return f"\n    cure: restore the file, or move {path} away and resume from the checkpoint before it"


def latest(checkpoints: Path, *, deep: bool = False) -> Path | None:
    """The checkpoint to go on from: the one that LATEST names, else the newest valid one; None without any.

    What is skipped is said on stderr, with the reason.
    """
    named = pointed(checkpoints, "LATEST")
    for path in [*([named] if named else []), *(path for path in folders(checkpoints) if path != named)]:
        try:
            validate(path, deep=deep)
            return path
        except CheckpointError as error:
            print(f"loomtune: checkpoint {path.name} is skipped: {error}", file=sys.stderr)  # noqa: T201
    return None


def best(checkpoints: Path) -> Path | None:
    """The checkpoint that was marked as best, if it is valid."""
    path = pointed(checkpoints, "BEST")
    if path:
        validate(path)
    return path


def mark_best(checkpoints: Path, name: str) -> None:
    """Makes a checkpoint the best one, which pruning spares."""
    validate(checkpoints / name)
    replace_text(checkpoints / "BEST", name + "\n")


def pointed(checkpoints: Path, pointer: str) -> Path | None:
    """The folder that LATEST or BEST names, if the file is there and names one."""
    try:
        name = (checkpoints / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return checkpoints / name if FOLDER.fullmatch(name) else None


def folders(checkpoints: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, newest step first, those that stepped aside after their successors."""
    found = [path for path in checkpoints.glob("step-*") if FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix != ".old"), reverse=True)


def step_of(path: Path) -> int:
    """The step in a folder's name."""
    return int(path.name.removeprefix("step-").removesuffix(".old"))


def place(draft: Path, final: Path) -> None:
    """Gives a complete folder its name, and LATEST to it."""
    if final.exists():
        aside = final.with_name(final.name + ".old")
        _discard(aside)
        final.rename(aside)
    draft.rename(final)
    replace_text(final.parent / "LATEST", final.name + "\n")


def prune(checkpoints: Path, newest: Path, keep: int) -> None:
    """Leaves the newest and the `keep - 1` valid ones before it, the best one, and what is later than the newest."""
    spared = {newest, pointed(checkpoints, "BEST")}
    before = [path for path in folders(checkpoints) if step_of(path) < step_of(newest) and path not in spared]
    for path in list(_valid(before))[max(keep - 1, 0) :]:
        _discard(path)
    superseded = [path for path in checkpoints.glob("step-*.old") if path.with_suffix("").exists()]
    for path in [*superseded, *checkpoints.glob("step-*.tmp-*"), *checkpoints.glob(".*-????????")]:
        _discard(path)


def _valid(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            validate(path)
            yield path
        except CheckpointError:
            continue


def _discard(path: Path) -> None:
    """Takes the name away first, so that a kill half-way leaves nothing that looks like a checkpoint."""
    if path.exists():
        trash = path.with_name(f".trash-{uuid4().hex[:8]}")
        path.rename(trash)
        if trash.is_dir():
            shutil.rmtree(trash, ignore_errors=True)
        else:
            trash.unlink()
