"""Finding files, and saying what lies near one that is not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from loomtune.errors import Fault, near


def find(patterns: str) -> list[Path]:
    """The files of those names, or that match the patterns, each once; those of a pattern in order of names."""
    return list(dict.fromkeys(path for pattern in _each(patterns) for path in _matches(pattern)))


def absences(name: str, patterns: str) -> Iterator[Fault]:
    """What is wrong with a setting, where one of its paths or patterns leads to no file."""
    for pattern in _each(patterns):
        if not _matches(pattern):
            yield _absence(name, Path(pattern).expanduser())


def names(paths: Sequence[Path]) -> dict[Path, str]:
    """What files are called where rows tell of them: their names, after as many folders as it takes to differ."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {path: "/".join(path.parts[-depth:]) for path in paths}


def _each(patterns: str) -> list[str]:
    """Names are separated by commas; one that has a comma itself is found where it stands alone."""
    if Path(patterns).expanduser().is_file():
        return [patterns]
    return [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    relative = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
    if not any(mark in pattern for mark in "*?["):
        return []
    return sorted(found for found in root.glob(relative) if found.is_file())


def _absence(name: str, path: Path) -> Fault:
    """With what lies near it."""
    cure = f"set data.{name} to a file that exists"
    if path.is_dir():
        return Fault(f"data.{name}={path} is a folder", f"name a file, or all of them: data.{name}='{path}/*'")
    if path.exists():
        return Fault(f"data.{name}={path} is a pipe or a device, which may never end", cure)
    folder = path.parent
    if not folder.is_dir():
        return Fault(f"data.{name}={path}: there is no folder {folder.absolute()}", cure)
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    has = f" {folder.absolute()} holds {', '.join(there[:8]) or 'no files'}{', ...' if len(there) > 8 else ''}."
    return Fault(f"data.{name}={path} does not exist.{near(path.name, there)}{has}", cure)
