"""What is told of what was prepared, and whether it is still that. No time, and no path of a machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loomtune import __version__
from loomtune.contracts import LinkStage
from loomtune.errors import RunFailed
from loomtune_plugins.commands.prepare.counts import READ, Counts
from loomtune_plugins.commands.prepare.deciding import SPLITS
from loomtune_plugins.commands.prepare.job import FORMAT, Job, Work
from loomtune_plugins.commands.prepare.parts import read_json

NAME = "manifest.json"
_FILE = ("split", "name", "rows", "bytes", "sha256")


def told(
    work: Work, records: int, counts: Counts, links: Mapping[str, Mapping[str, Any]], files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The whole manifest. Raises RunFailed where the numbers do not add up.

    records: of the source. links: what was found of each link. files: split, name, rows, bytes, sha256 of the output.
    """
    reading = counts.stages[READ]
    stages = [_stage(work, node, counts, links) for node in work.job.shown]
    rows = _out(reading)
    for stage in stages:
        _agree(stage["in"], rows, f"stage={stage['name']} saw")
        rows = stage["out"]
    written = [
        {key: file[key] for key in ("split", "name", "rows", "bytes", "sha256") if key in file} for file in files
    ]
    _agree(sum(file.get("rows", 0) for file in files), rows, "the files hold")
    return {
        **_head(work.job),
        "versions": _versions(work),
        "inputs": list(work.job.inputs),
        "read": {"records": records, "rows": _out(reading), "dropped": reading["dropped"]},
        "stages": stages,
        "splits": _splits(written, links),
        "files": [file for file in written if "split" in file],
        "dropped_files": [file for file in written if "split" not in file],
    }


def key_of(out: Path) -> str:
    """Of the job that was prepared in a folder; empty where that cannot be told."""
    try:
        return str(read_json(out / NAME)["key"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def intact(out: Path, key: str) -> bool:
    """Whether a folder holds what a job of this key makes, to the last byte."""
    try:
        manifest = read_json(out / NAME)
        files = [*manifest["files"], *manifest["dropped_files"]]
        return manifest["key"] == key and all(_digest(out / file["name"]) == file["sha256"] for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _head(job: Job) -> dict[str, Any]:
    data = {"name": job.data["name"], "fingerprint": job.fingerprint}
    head = {"format": FORMAT, "key": job.key, "loomtune": __version__, "data": data, "seed": job.seed}
    return {**head, "licence": job.licence}


def _versions(work: Work) -> dict[str, str]:
    return dict(sorted((name, text) for stage in work.stages.values() for name, text in stage.versions().items()))


def _stage(
    work: Work, node: Mapping[str, Any], counts: Counts, links: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    name = node["stage"]
    of = counts.stages.get(name, {"in": 0, "dropped": {}})
    found = {"found": links[name]} if isinstance(work.stages[name], LinkStage) else {}
    return {"name": name, **node, "in": of["in"], "out": _out(of), "dropped": of["dropped"], **found}


def _splits(files: Sequence[Mapping[str, Any]], links: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of each split, and what share of those that were drawn was asked for and came of it."""
    asked: Mapping[str, float] = next((found["asked"] for found in links.values() if "asked" in found), {})
    rows = {split: sum(file["rows"] for file in files if file.get("split") == split) for split in SPLITS}
    drawn, whole = sum(rows[split] for split in asked) or 1, sum(asked.values()) or 1.0
    shares = {split: {"asked": share / whole, "actual": rows[split] / drawn} for split, share in asked.items()}
    return {split: {"rows": count, **shares.get(split, {})} for split, count in rows.items() if count}


def _out(counted: Mapping[str, Any]) -> int:
    return int(counted["in"]) - sum(int(of["rows"]) for of in counted["dropped"].values())


def _agree(one: int, other: int, what: str) -> None:
    if one != other:
        raise RunFailed(f"{what} {one} rows, and {other} came there: an error of loomtune's; nothing was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reasons(stage: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Why rows were dropped there, and how many."""
    for reason, of in sorted(stage["dropped"].items(), key=lambda item: (-item[1]["rows"], item[0])):
        yield reason, of["rows"]
