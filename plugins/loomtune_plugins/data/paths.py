"""Finding files, and saying what lies near one that is not there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from loomtune.errors import Fault, near


def find(pattern: str) -> list[Path]:
    """The file of that name, or those that match the pattern, in order of names; empty where there is none."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    relative = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
    if not any(mark in pattern for mark in "*?["):
        return []
    return sorted(found for found in root.glob(relative) if found.is_file())


def absence(name: str, path: Path) -> Fault:
    """What is wrong with a setting whose path leads to no file, with what lies near it."""
    cure = f"set data.{name} to a file that exists"
    if path.is_dir():
        return Fault(f"data.{name}={path} is a folder", f"name a file, or all of them: data.{name}='{path}/*'")
    folder = path.parent
    if not folder.is_dir():
        return Fault(f"data.{name}={path}: there is no folder {folder.absolute()}", cure)
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    has = f" {folder.absolute()} holds {', '.join(there[:8]) or 'no files'}{', ...' if len(there) > 8 else ''}."
    return Fault(f"data.{name}={path} does not exist.{near(path.name, there)}{has}", cure)


def content_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
