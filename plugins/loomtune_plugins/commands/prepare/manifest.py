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
from loomtune_plugins.commands.prepare.losses import warnings
from loomtune_plugins.commands.prepare.parts import read_json

NAME = "manifest.json"
_FILE = ("split", "page", "name", "rows", "bytes", "sha256")


def accounted(
    work: Work, records: int, counts: Counts, links: Mapping[str, Mapping[str, Any]], left: Mapping[str, int]
) -> dict[str, Any]:
    """What became of every row. Raises RunFailed where the numbers do not add up.

    records: of the source. links: what was found of each link. left: split to its rows at the end.
    """
    reading = counts.stages[READ]
    stages = [_stage(work, node, counts, links) for node in work.job.shown]
    rows = _out(reading)
    for stage in stages:
        _agree(stage["in"], rows, f"stage={stage['name']} saw")
        rows = stage["out"]
    _agree(sum(left.values()), rows, "there are")
    splits = _splits(left, links)
    return {
        "read": {"records": records, "rows": _out(reading), "dropped": reading["dropped"]},
        "stages": stages,
        "splits": splits,
        "warnings": warnings(stages, splits),
    }


def told(work: Work, account: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole manifest. files: split, name, rows, bytes, sha256 of the output. Raises RunFailed as above."""
    written = [{key: file[key] for key in _FILE if key in file} for file in files]
    left = sum(of["rows"] for of in account["splits"].values())
    _agree(sum(file.get("rows", 0) for file in files), left, "the files hold")
    return {
        **_head(work.job),
        "versions": dict(work.job.versions),
        "inputs": list(work.job.inputs),
        **account,
        "files": [file for file in written if "split" in file],
        "dropped_files": [file for file in written if not file.keys() & {"split", "page"}],
        "pages": [file for file in written if "page" in file],
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
        files = [*manifest["files"], *manifest["dropped_files"], *manifest["pages"]]
        return manifest["key"] == key and all(_digest(out / file["name"]) == file["sha256"] for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _head(job: Job) -> dict[str, Any]:
    data = {"name": job.data["name"], "fingerprint": job.fingerprint}
    head = {"format": FORMAT, "key": job.key, "loomtune": __version__, "data": data, "seed": job.seed}
    return {**head, "licence": job.licence}


def _stage(
    work: Work, node: Mapping[str, Any], counts: Counts, links: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    name = node["stage"]
    of = counts.stages.get(name, {"in": 0, "dropped": {}})
    found = {"found": links[name]} if isinstance(work.stages[name], LinkStage) else {}
    more: dict[str, Any] = {key: of[key] for key in ("changed", "held") if key in of}
    return {"name": name, **node, "in": of["in"], "out": _out(of), "dropped": of["dropped"], **more, **found}


def _splits(rows: Mapping[str, int], links: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of each split, and what share of those that were drawn was asked for and came of it."""
    asked: Mapping[str, float] = next((found["asked"] for found in links.values() if "asked" in found), {})
    drawn, whole = sum(rows[split] for split in asked) or 1, sum(asked.values()) or 1.0
    shares = {split: {"asked": share / whole, "actual": rows[split] / drawn} for split, share in asked.items()}
    kept = {split: rows[split] for split in SPLITS if rows[split] or split in asked}
    return {split: {"rows": count, **shares.get(split, {})} for split, count in kept.items()}


def differences(out: Path, job: Job) -> list[str]:
    """In what a finished folder differs from a job, in the user's words."""
    try:
        other = read_json(out / NAME)
        found = [*_differing(other, job)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ["its manifest, which cannot be read"]
    return found or ["what it was read from"]


def _differing(other: Mapping[str, Any], job: Job) -> Iterator[str]:
    for what, there, here in (
        ("the version of loomtune", other["loomtune"], __version__),
        ("the format", other["format"], FORMAT),
        ("data", other["data"]["name"], job.data["name"]),
        ("seed", other["seed"], job.seed),
        ("--licence", other["licence"], job.licence),
        ("--dropped", bool(other["dropped_files"]), job.keep_dropped),
        ("stage", [one["stage"] for one in other["stages"]], [one["stage"] for one in job.shown]),
    ):
        if there != here:
            yield f"{what} (there {_plain(there)}, here {_plain(here)})"
    yield from _inputs(other, job)
    here = {one["stage"]: one for one in job.shown}
    for one in other["stages"]:
        yield from _settings(one, here.get(one["stage"], one))


def _plain(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else repr(value) if isinstance(value, str) else str(value)


def _inputs(other: Mapping[str, Any], job: Job) -> Iterator[str]:
    there, here = ({(one["split"], one["name"]): one["digest"] for one in of} for of in (other["inputs"], job.inputs))
    changed = [
        f"{split} {name}" for split, name in sorted(there | here) if there.get((split, name)) != here.get((split, name))
    ]
    if changed:
        yield f"inputs ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''})"
    elif other["data"]["fingerprint"] != job.fingerprint:
        yield "settings of data, by which the inputs are read"


def _settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    name, one, other = there["stage"], there["settings"], here["settings"]
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            yield f"stage.{name}.{key} (there {one.get(key)}, here {other.get(key)})"
    if there["fingerprint"] != here["fingerprint"]:
        yield f"files that stage={name} reads"


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
