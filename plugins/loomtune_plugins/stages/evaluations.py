"""Evaluation files: the texts in them, and where each stands."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from loomtune.errors import UserError
from loomtune_plugins.stages.unpacked import ARCHIVES, LINE, lines, whole

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
KEY = "stage.decontaminate.against"
HELD_OUT = ("validation", "test")


def found(patterns: Sequence[str]) -> list[Path]:
    """The files that names, globs and folders mean, in their order, each once. Raises UserError where one is none."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        folder = Path(pattern).is_dir()
        if folder and (held_out := _held_out(Path(pattern))):
            files |= dict.fromkeys(held_out)
            continue
        names = sorted(glob(f"{pattern}/**/*" if folder else pattern, recursive=True))  # noqa: PTH207 - may be absolute
        paths = [Path(name) for name in names if Path(name).is_file()]
        known = [path for path in paths if _ending(path) in ENDINGS and path.name != "manifest.json"]
        if not known or (not folder and len(known) < len(paths)):
            what = f"{KEY}: {pattern} is no evaluation file"
            raise UserError.of(what, f"name files that end in {', '.join(ENDINGS)}, or folders of them")
        files |= dict.fromkeys(known)
    return list(files)


def _held_out(folder: Path) -> list[Path]:
    """The files of a folder of prepared rows that nothing is learned from; all, where nothing is held out."""
    try:
        entries = json.loads((folder / "manifest.json").read_bytes())["files"]
        named = [(one["split"], folder / Path(one["name"]).name) for one in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{KEY}: {folder}/manifest.json is no manifest of prepared rows ({type(error).__name__}: {error})"
        raise UserError.of(what, "name the files that are meant rather than their folder") from error
    files = [path for split, path in named if split in HELD_OUT] or [path for _, path in named]
    if missing := [path.name for path in files if not path.is_file()]:
        what = f"{KEY}: {folder} lacks {', '.join(missing)}, which its manifest lists"
        raise UserError.of(what, "prepare it again, or name the files that are meant")
    return files


def digest(files: Sequence[Path]) -> str:
    """Of the contents of files, in their order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def texts(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(row from 1, a text in it): of the columns named, or of all. Raises UserError where they are not there."""
    for number, record in enumerate(_records(path), 1):
        if record is None:  # an empty line
            continue
        if columns and not isinstance(record, dict):
            raise UserError.of(f"{path}:{number} has no columns", "leave stage.decontaminate.columns out")
        if missing := sorted(set(columns) - set(record)):
            what = f"{path}:{number} has no column {', '.join(missing)}"
            raise UserError.of(what, "set stage.decontaminate.columns to columns of all these files")
        yield from ((number, text) for text in _strings([record[key] for key in columns] if columns else record))


def _records(path: Path) -> Iterator[Any]:
    try:
        if _ending(path) == ".parquet":
            yield from _parquet(path)
        elif _ending(path) == ".json":
            read = json.loads(whole(path))
            yield from read if isinstance(read, list) else [read]
        elif _ending(path) in (".csv", ".tsv"):
            csv.field_size_limit(max(csv.field_size_limit(), LINE))
            yield from csv.DictReader(lines(path, newline=""), delimiter="\t" if _ending(path) == ".tsv" else ",")
        elif _ending(path) == ".txt":
            yield from lines(path)
        else:
            yield from (json.loads(line) if line.strip() else None for line in lines(path))
    except (OSError, EOFError, ValueError, RecursionError, csv.Error) as error:
        raise UserError.of(f"{path} cannot be read: {error}", f"mend it, or leave it out of {KEY}") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _ending(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in ARCHIVES else path.suffix
