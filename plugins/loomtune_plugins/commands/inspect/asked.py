"""What `loomtune inspect [DATA] [key=value ...]` is about: the plan of a run that would read these rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from loomtune import api
from loomtune.catalogue import installed
from loomtune.compose import quoted
from loomtune.errors import UserError
from loomtune.plan import Finding, Plan
from loomtune.run import Run

SETTING = re.compile(r"[+~]{0,2}[\w./@]+=")
TABLES = (".parquet",)
SAVED = ("state.json", "dataset_dict.json")
"""Of these a folder holds one in which the library `datasets` saved something."""


def planned(words: Sequence[str]) -> tuple[Plan, Path | None]:
    """The plan of a run, and its folder where DATA names one. Raises UserError as `loomtune train` does."""
    named = [word for word in words if Path(word).exists() or not SETTING.match(word)]
    settings = [word for word in words if word not in named]
    if len(named) > 1:
        told = f"{len(named)} names are given: {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}"
        raise UserError.of(told, "name one; several files in one pattern, quoted against the shell: 'folder/*.jsonl'")
    folder = Path(named[0]).expanduser() if named else None
    if folder is not None and (folder / "run.yaml").is_file():
        return api.resumed(folder, settings), folder
    return api.compose([*(_data(named[0], settings) if named else ()), *settings]), None


def _data(named: str, settings: Sequence[str]) -> list[str]:
    """The choice of data, unless one was made, and where they are."""
    path = Path(named).expanduser()
    chosen = any(word.startswith("data=") for word in settings)
    return [*([] if chosen else [f"data={_kind(path)}"]), f"data.path={quoted(str(path))}"]


def _kind(path: Path) -> str:
    if (path / "manifest.json").is_file():
        return "prepared"
    if any((path / name).is_file() for name in SAVED):
        return "datasets"
    if path.is_dir():
        raise UserError.of(
            f"{path} is neither a run's folder (it has no run.yaml) nor one of prepared rows (no manifest.json), nor "
            f"one that datasets saved (no {SAVED[0]})",
            f"name a file, or all of them: '{path}/*'; `loomtune plugins data` lists what else can be read, by data=",
        )
    if "files" in installed().names("data"):
        return "files"
    return "parquet" if path.suffix in TABLES else "jsonl"


def changed(folder: Path, run: Run, split: str) -> list[Finding]:
    """A warning where a run has been trained on other samples than its settings give now."""
    before = folder / "samples.json"
    known = json.loads(before.read_text()).get(split, {}) if before.is_file() else {}
    if known.get("key", run.splits[split].key) == run.splits[split].key:
        return []
    what = f"the run in {folder} was made with other samples of {split}: its files, or these settings, are not the same"
    return [Finding(what, "restore the files, or name the run without other settings", fatal=False)]
