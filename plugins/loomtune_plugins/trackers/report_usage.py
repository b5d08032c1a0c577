"""What a report shows of what a run used: time by phase, memory, use of the peak, and what was foretold of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loomtune_plugins import page
from loomtune_plugins.charts import curves, stacked

PHASES = ("data", "rollout", "forward", "backward", "optimizer", "other", "evaluation", "checkpoint")
CURVES = {
    "mfu": "MFU, of the operations that the model asks for",
    "mfu_palm": "MFU, 6N + 12 x layers x width x length a token",
    "exposed_communication_seconds": "Waiting for other ranks, seconds a step",
    "all_tokens_per_second": "Tokens per second, prompts too",
}

Lines = Sequence[Mapping[str, Any]]
Form = Callable[[float], str]


def drawn(lines: Lines, points: int) -> str:
    """Where time and memory went, step by step."""
    steps = [line for line in lines if line.get("step", 0) > 0]
    bands = {name: _values(steps, f"seconds/{name}") for name in PHASES}
    bands = {name: values for name, values in bands.items() if any(value for _, value in values)}
    figures = [("Seconds a step by phase", stacked("phases", bands, points))] if bands else []
    peaks = {f"memory_bytes/{name}": f"Peak memory in {name}, bytes" for name in PHASES}
    return page.figures("Use", [*figures, *curves(steps, {**CURVES, **peaks}, points)])


def _values(steps: Lines, name: str) -> list[tuple[float, float]]:
    """(step, value) of all steps; one that has no such phase spent nothing in it."""
    return [(line["step"], line.get(name) or 0.0) for line in steps]


def foretold(folder: Path, lines: Lines) -> str:
    """What `RUN/plan.json` foretold beside what came; nothing where there is none.

    Medians, without the first step, in which much is made for good.
    """
    plan, steps = _json(folder / "plan.json"), [line for line in lines if line.get("step", 0) > 0]
    if not plan or not steps:
        return ""
    rows = _peaks(_at(plan, "memory", "peak_bytes"), _json(folder / "measured.json"), steps)
    for what, keys, name, form in COMPARED:
        planned, came = _at(plan, *keys), _typical(steps, name)
        if planned is not None and came is not None:
            rows.append([*_row(what, planned, came, form), ""])
    return page.grid("Foretold and measured", ["", "foretold", "measured", "off", ""], rows, folded=False)


def _peaks(planned: Any, dry: Mapping[str, Any], steps: Lines) -> list[list[str]]:
    """That of a CPU's process has its libraries in it, which no plan counts: shown, and compared with nothing."""
    what = "peak memory of a rank"
    dried = max(_at(dry, "dry_step", "peak_bytes") or [0])
    came = max((line.get("memory_bytes") or 0 for line in steps), default=0)
    rows = [[*_row(what, planned, dried, _gib), "in the dry step"]] if dried else []
    if any("memory_bytes/forward" in line for line in steps):
        return [*rows, [*_row(what, planned, came, _gib), "in training"]]
    return [*rows, [what, _told(planned, _gib), _gib(came), "", "of the process, libraries and all"]] if came else rows


def _row(what: str, planned: Any, came: float, form: Form) -> list[str]:
    return [what, _told(planned, form), form(came), _off(planned, came)]


def _told(planned: Any, form: Form) -> str:
    if planned is None:
        return ""
    return " to ".join(map(form, planned)) if isinstance(planned, list) else form(planned)


def _off(planned: Any, came: float) -> str:
    """How far what came lies from what was foretold, or from the nearer end of it."""
    low, high = planned if isinstance(planned, list) else (planned, planned)
    if not low or not high:
        return ""
    if low < high and low <= came <= high:
        return "within"
    return f"{came / (low if came < low else high) - 1:+.1%}"


def _typical(steps: Lines, name: str) -> float | None:
    values = [line[name] for line in steps[1:] or steps if line.get(name) is not None]
    return median(values) if values else None


def _gib(bytes: float) -> str:
    return f"{bytes / 2**30:.2f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _count(count: float) -> str:
    return f"{count:,.0f}"


def _share(share: float) -> str:
    return f"{share:.1%}"


def _at(tree: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) or {}
    return tree or None


def _json(path: Path) -> dict[str, Any]:
    """A file of the run's folder; nothing where it is not there, or not whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


COMPARED: tuple[tuple[str, tuple[str, ...], str, Form], ...] = (
    ("seconds of a step", ("time", "step_seconds"), "seconds", _seconds),
    ("tokens per second, prompts too", ("time", "tokens_per_second"), "all_tokens_per_second", _count),
    ("MFU", ("compute", "mfu"), "mfu", _share),
    ("MFU as PaLM counts it", ("compute", "mfu_palm"), "mfu_palm", _share),
)
"""What it is, where the plan has it, which metric it is, and how it is written."""
