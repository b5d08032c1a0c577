"""Charts of reports and comparisons, as SVG that stands in a page by itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loomtune_plugins.measured import Measured

LINE, FAINT, GROUND = "#2f6fde", "#b9cdf3", "#98a2b3"
_SMOOTH_FROM = 40
"""Curves with more points than this also get a smooth line: single steps are noisy."""
_LEGEND, _WIDE = 14, 20
_BARS = 120
"""Bars that are told apart in a chart."""
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
Point = tuple[float, float]


def curves(lines: Sequence[Mapping[str, Any]], shown: Mapping[str, str], points: int) -> list[tuple[str, str]]:
    """(caption, svg) of each metric over the steps; metrics without values are left out.

    shown: metric to caption. points: more values than this are averaged over as many spans.
    """
    drawn = []
    for name, caption in shown.items():
        values = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if values:
            drawn.append((caption, _curve(name, thinned(values, points))))
    return drawn


def bars(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """(caption, svg) of each evaluation's metric: before and after, each in a chart of its own, for units differ."""
    return [(entry.name, _bars(entry)) for entry in measured if entry.before is not None or entry.after is not None]


def together(name: str, runs: Mapping[str, Sequence[Point]], points: int = 400) -> str:
    """One metric of several runs over the steps. runs: label to (step, value) pairs; of many, no legend is drawn."""
    with _axes(f"together-{name}", 7.4, 3.6) as (axes, drawing):
        for number, (label, values) in enumerate(runs.items()):
            drawn = thinned(values, points)
            steps, level = [step for step, _ in drawn], [value for _, value in drawn]
            level = smoothed(level) if len(level) > _SMOOTH_FROM else level
            marker = "." if len(drawn) < 3 else ""
            axes.plot(steps, level, label=_plain(label), linewidth=1.3, marker=marker, color=f"C{number % 10}")
        axes.grid(axis="y", color="#eceef2", linewidth=0.8)
        axes.set_xlabel("step", color=GROUND)
        if len(runs) <= _LEGEND:
            axes.legend(frameon=False, fontsize=7)
    return _svg(drawing)


def stacked(name: str, bands: Mapping[str, Sequence[Point]], points: int = 400) -> str:
    """Bars over the steps, of which each band is a part. bands: label to (step, value) pairs of the same steps."""
    with _axes(f"stacked-{name}", 3.6, 2.8) as (axes, drawing):
        below: list[float] = []
        for number, (label, values) in enumerate(bands.items()):
            drawn = thinned(values, min(points, _BARS))
            steps, heights = [step for step, _ in drawn], [value for _, value in drawn]
            below = below or [0.0] * len(drawn)
            width = steps[1] - steps[0] if len(steps) > 1 else 1.0
            axes.bar(steps, heights, width, below, label=_plain(label), color=f"C{number % 10}")
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.margins(x=0.01)
        axes.set_xlabel("step", color=GROUND)
        axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return _svg(drawing)


def against(name: str, values: Sequence[tuple[Any, float]]) -> str:
    """What each value of a setting came to. Numbers lie on an axis, by their logarithm where they span much."""
    at = [value for value, _ in values]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in at)
    with _axes(f"against-{name}", 3.6, 2.2) as (axes, drawing):
        order = dict.fromkeys(map(str, at))
        xs = at if numbers else [list(order).index(str(value)) for value in at]
        axes.plot(xs, [value for _, value in values], linestyle="", marker="o", markersize=4, color=LINE, alpha=0.8)
        if not numbers:
            axes.set_xticks(range(len(order)), [_plain(name) for name in order], rotation=20 if len(order) > 4 else 0)
            axes.margins(x=0.2)
        elif min(at) > 0 and max(at) / min(at) >= _WIDE:
            axes.set_xscale("log")
        axes.grid(axis="y", color="#eceef2", linewidth=0.8)
        axes.set_xlabel(_plain(name), color=GROUND)
    return _svg(drawing)


def _plain(text: str) -> str:
    """As it stands: what is between two dollars would be taken for a formula."""
    return text.replace("$", r"\$")


def thinned(values: Sequence[Point], points: int) -> list[Point]:
    """At most so many points: means over spans of equal count; short curves as they are."""
    span = -(-len(values) // points)
    chunks = [values[start : start + span] for start in range(0, len(values), span)]
    return [(_mean([step for step, _ in chunk]), _mean([value for _, value in chunk])) for chunk in chunks]


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean whose weights fall by a factor of e over a fiftieth of the curve, without bias at the start."""
    keep = 1 - min(1.0, 50 / len(values))
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _curve(name: str, points: Sequence[Point]) -> str:
    steps, values = [step for step, _ in points], [value for _, value in points]
    noisy = len(points) > _SMOOTH_FROM and name != "lr"
    with _axes(f"curve-{name}", 3.6, 2.2) as (axes, drawing):
        axes.plot(
            steps,
            values,
            color=FAINT if noisy else LINE,
            linewidth=1.0 if noisy else 1.6,
            marker="." if len(points) < 3 else "",
        )
        if noisy:
            axes.plot(steps, smoothed(values), color=LINE, linewidth=1.6)
        axes.grid(axis="y", color="#eceef2", linewidth=0.8)
        axes.margins(x=0.01)
        axes.set_xlabel("step", color=GROUND)
    return _svg(drawing)


def _bars(entry: Measured) -> str:
    known = [(label, value) for label, value in (("after", entry.after), ("before", entry.before)) if value is not None]
    with _axes(f"bars-{entry.name}", 3.6, 1.1) as (axes, drawing):
        colours = [LINE if label == "after" else FAINT for label, _ in known]
        drawn = axes.barh([label for label, _ in known], [value for _, value in known], height=0.62, color=colours)
        axes.bar_label(drawn, labels=[f"{value:.4g}" for _, value in known], padding=4, color="#1d2433")
        axes.margins(x=0.22)
        axes.axvline(0, color="#d0d5dd", linewidth=0.8)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return _svg(drawing)


@contextmanager
def _axes(salt: str, width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on and where their SVG will be; sizes in inches. salt: makes ids differ from other charts' ids."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {
        "svg.hashsalt": salt,
        "svg.fonttype": "path",
        "font.size": 8,
        "axes.edgecolor": "#d0d5dd",
        "xtick.color": "#667085",
        "ytick.color": "#667085",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
    }
    drawing = io.StringIO()
    with mpl.rc_context(look):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), drawing
        figure.savefig(drawing, format="svg", metadata=_METADATA, transparent=True)


def _svg(drawing: io.StringIO) -> str:
    """The `<svg>` element alone: no prologue and no namespace addresses, which HTML does not need."""
    text = drawing.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
