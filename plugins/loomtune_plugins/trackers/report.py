"""report.html: a run on one page that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loomtune import hookimpl
from loomtune.contracts import Tracker
from loomtune.errors import UserError
from loomtune_plugins import page
from loomtune_plugins.charts import bars, curves
from loomtune_plugins.lines import read
from loomtune_plugins.measured import BEFORE, OF_THE_LOOP, OF_USE, before_and_after, by_step, evaluations
from loomtune_plugins.trackers import report_rollouts, report_usage
from loomtune_plugins.trackers.secrets import without_secrets
from loomtune_plugins.trackers.settings import ReportSettings

if TYPE_CHECKING:
    from loomtune.run import Run

CURVES = {"loss": "Loss", "grad_norm": "Gradient norm", "lr": "Learning rate", "tokens_per_second": "Tokens per second"}


class Report(Tracker):
    """Writes the page when the run ends; `render` makes it again from the run's files alone."""

    def __init__(self, settings: ReportSettings) -> None:
        if settings.points < 2:
            raise UserError.of(
                f"tracker.report.points={settings.points} draws no curve", "set tracker.report.points=1000"
            )
        self._points = settings.points

    @hookimpl
    def run_finished(self, run: Run, status: str) -> None:
        """Writes `RUN/report.html`, unless the run ended before its first step."""
        if read(run.folder):
            self._write(run.folder, status)

    def redraw(self, folder: Path) -> Path:
        """Writes `report.html` again."""
        return self._write(folder)

    def _write(self, folder: Path, status: str = "") -> Path:
        path = folder / "report.html"
        path.write_text(self.render(folder, status), encoding="utf-8")
        return path

    def describe(self, run: Run) -> str:
        """Where the page is."""
        return f"report: {run.folder / 'report.html'}"

    def render(self, folder: Path, status: str = "") -> str:
        """The page of a run's folder, from `metrics.jsonl`, `run.yaml` and, where the run is over, `result.json`.

        status: how the run ended, where `result.json` does not say so yet. Raises UserError where no step was recorded.
        """
        lines = read(folder)
        if not lines:
            raise UserError.of(f"{folder} has no metrics to report", "name the folder of a run that made a step")
        result, frozen = _json(folder / "result.json"), _yaml(folder / "run.yaml")
        status = result.get("status") or status or "unfinished"
        versions = {str(name): str(value) for name, value in frozen.get("plugins", {}).items()}
        return page.document(
            folder.resolve().name,
            page.heading(folder.resolve().name, status, result.get("error")),
            page.facts(_facts(lines)),
            self._evaluations(lines),
            report_rollouts.drawn(lines, self._points),
            report_rollouts.some(folder),
            page.figures("Training", curves(lines, _shown(lines), self._points)),
            report_usage.foretold(folder, lines),
            report_usage.drawn(lines, self._points),
            page.table("Settings", flat(without_secrets(frozen.get("settings", {}))), folded=True),
            page.table("Versions", versions, folded=True),
        )

    def _evaluations(self, lines: list[dict[str, Any]]) -> str:
        names = evaluations(lines)
        points = [
            {"step": step, **{name.removesuffix(BEFORE): value for name, value in metrics.items()}}
            for step, metrics in by_step(lines).items()
        ]
        often = {name: name for name in names if sum(name in point for point in points) > 2}
        return page.figures("Before and after", bars(before_and_after(lines, names))) + page.figures(
            "Evaluations", curves(points, often, self._points)
        )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys, as users type them, to values as text."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _shown(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The loop's curves, then the objective's own metrics."""
    own = {key for line in lines if line.get("step", 0) > 0 for key in line} - {*OF_THE_LOOP, *evaluations(lines)}
    own = {key for key in own if not key.startswith(OF_USE)}
    own -= report_rollouts.CURVES.keys() if report_rollouts.learns_online(lines) else set()
    return {**CURVES, **{key: escape(key) for key in sorted(own)}}


def _facts(lines: list[dict[str, Any]]) -> dict[str, str]:
    """What one wants to know first."""
    steps = [line for line in lines if line.get("step", 0) > 0]
    if not steps:
        return {"optimizer steps": "0"}
    last = steps[-1]
    found = {"optimizer steps": f"{last['step']:,}"}
    if last.get("loss") is not None:
        found["last loss"] = f"{last['loss']:.4g}"
    if last.get("tokens_seen") is not None:
        found["target tokens"] = f"{last['tokens_seen']:,.0f}"
    seconds = sum(line.get("seconds") or 0 for line in steps)
    if seconds:
        found["time in steps"] = page.duration(seconds)
    if (used := last.get("mfu")) is not None:
        found["MFU of the last step"] = f"{used:.1%}"
    memory = max((line.get("memory_bytes") or 0 for line in steps), default=0)
    if memory:
        found["peak memory"] = f"{memory / 2**30:.2f} GiB"
    return found


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _yaml(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    return found
