"""`rollouts/step-<8 digits>.jsonl`: some completions of a batch with their rewards, a line each.

Whatever a model wrote may stand in them. Who shows it to people shows `plain` of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "rollouts"
COLUMNS = ("step", "prompt", "completion", "reward", "rewards", "advantage", "ended")
"""What tables show of a completion, in this order."""

LONGEST = 16_000
"""Characters of a text that are kept where not all completions are: so a batch has a largest size."""

Rows = Sequence[Mapping[str, Any]]


class Rollouts:
    """The files of a run, written by one process.

    most: completions of a batch that are kept, those of the first prompts; -1: all. files: batches that are kept; where
    more come, every second one goes, but the first and the newest. 0: all stay.
    """

    def __init__(self, folder: Path, most: int, files: int) -> None:
        self.folder, self.most, self.files = folder / FOLDER, most, files

    def write(self, step: int, samples: Rows) -> None:
        """A batch's file, which is there whole or not at all. step: the first that learns from it."""
        if not self.most:
            return
        self.folder.mkdir(exist_ok=True)
        longest = 0 if self.most < 0 else LONGEST
        kept = samples if self.most < 0 else samples[: self.most]
        path = self.folder / f"step-{step:08d}.jsonl"
        draft = path.with_suffix(".jsonl.new")
        draft.write_text("".join(_line(step, sample, longest) for sample in kept), encoding="utf-8")
        draft.replace(path)
        if self.files and len(found := files(self.folder.parent)) > self.files:
            for old in found[1:-1:2]:
                old.unlink()

    def cut(self, step: int) -> None:
        """Takes away what belongs to later steps: what was generated for them is generated again. -1: all."""
        for path in files(self.folder.parent):
            if step_of(path) > step:
                path.unlink()

    def sync(self) -> None:
        """Waits until the disk has the newest file."""
        for path in files(self.folder.parent)[-1:]:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def files(run: Path) -> list[Path]:
    """The files of a run's folder, by step."""
    return sorted((path for path in (run / FOLDER).glob("step-*.jsonl") if path.stem[5:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """The step that is the first to learn from what a file holds."""
    return int(path.stem.removeprefix("step-"))


def rows(path: Path) -> list[dict[str, Any]]:
    """What a file holds; a line that is no JSON object is left out."""
    return list(_objects(path))


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _line(step: int, sample: Mapping[str, Any], longest: int) -> str:
    row = {"step": step, **{name: _held(value, longest) for name, value in sample.items()}}
    return json.dumps(row, allow_nan=False, default=str) + "\n"


def _held(value: Any, longest: int) -> Any:
    """As JSON holds it: what is no number becomes null, and a long text loses its middle."""
    if isinstance(value, Mapping):
        return {str(name): _held(one, longest) for name, one in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return shortened(value, longest) if isinstance(value, str) and longest else value


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, beside a word on those that are missing in its middle."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def plain(text: Any, most: int = LONGEST) -> str:
    """A text with what acts in it written out: control characters, what turns the direction, what shows nothing.

    Lines' ends and tabs stay.
    """
    short = shortened(str(text), most)
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in short)


def cells(step: int, row: Mapping[str, Any], most: int) -> list[str]:
    """A completion as texts, column by column; those of the rewards in one."""
    return [_cell({"step": step, **row}.get(name), most) for name in COLUMNS]


def _cell(value: Any, most: int) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "\n".join(f"{plain(name, 80)}: {_cell(one, most)}" for name, one in value.items())
    return plain(value, most)


def telling(samples: Rows, most: int) -> list[Mapping[str, Any]]:
    """At most so many completions of a batch, from the best to the worst; those without a reward are in none."""
    known = [row for row in samples if isinstance(row.get("reward"), int | float) and math.isfinite(row["reward"])]
    ordered = sorted(known, key=lambda row: -row["reward"])
    if len(ordered) <= most:
        return ordered
    above = -(-most // 2)
    return [*ordered[:above], *ordered[len(ordered) - (most - above) :]]
