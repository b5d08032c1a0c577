"""Pictures of a plan, and of a search: SVG that stands by itself."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Said = Mapping[str, Any]
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def moments(said: Said) -> str:
    """Memory of a rank by moment and cause, beside what the device has."""
    memory = said["memory"]
    names = list(memory["moments"])
    causes = sorted({cause for one in memory["moments"].values() for cause in one["causes_bytes"]})
    with _axes("moments", 8.0, 0.8 + 0.32 * len(names)) as (axes, drawing):
        start = [0.0] * len(names)
        for cause in causes:
            parts = [memory["moments"][name]["causes_bytes"].get(cause, 0) / 2**30 for name in names]
            axes.barh(names, parts, left=start, label=cause, height=0.7)
            start = [one + part for one, part in zip(start, parts, strict=True)]
        axes.invert_yaxis()
        if memory["capacity_bytes"]:
            axes.axvline(memory["capacity_bytes"] / 2**30, color="#a12622", linewidth=1.2, linestyle="--")
        axes.set_xlabel("GiB of a rank")
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return drawing.getvalue()


def frontier(found: Said) -> str:
    """Memory of a rank against tokens/s of everything that was tried, and the frontier of what fits."""
    capacity = found["capacity_bytes"] / 2**30
    with _axes("frontier", 7.4, 4.4) as (axes, drawing):
        for number, (label, rows) in enumerate(_families(found).items()):
            for fits, marker in ((True, "o"), (False, "x")):
                points = [_point(row) for row in rows if row["fits"] == fits and row["tokens_per_second"]]
                if points:
                    said = label if fits else f"{label}, does not fit"
                    axes.plot(
                        *zip(*points, strict=True),
                        linestyle="",
                        marker=marker,
                        markersize=5,
                        color=f"C{number % 10}",
                        label=said,
                    )
        best = list(_undominated([row for rows in _families(found).values() for row in rows]))
        if best:
            axes.step(
                *zip(*best, strict=True), where="post", color="#98a2b3", linewidth=1.2, zorder=0, label="frontier"
            )
        axes.axvline(capacity, color="#a12622", linewidth=1.2, linestyle="--", label=f"{capacity:.1f} GiB")
        axes.set_xlabel("GiB of a rank, at its peak")
        axes.set_ylabel("tokens/s, all ranks (middle of the range)")
        axes.set_title(f"{found['hardware']}, {found['world']['processes']} processes", fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return drawing.getvalue()


def _families(found: Said) -> dict[str, list[Said]]:
    """Label to rows: a colour for each sharding, and for each other maths."""
    families: dict[str, list[Said]] = {}
    for number, group in enumerate(found["groups"]):
        more = "" if number == 0 else ", " + ", ".join(map(str, group["maths"].values()))
        for row in (*group["ranked"], *group["fitting"], *group["unfit"]):
            families.setdefault(f"{row['sharding']}{more}", []).append(row)
    return families


def _point(row: Said) -> tuple[float, float]:
    low, high = row["tokens_per_second"]
    return row["peak_bytes"] / 2**30, math.sqrt(low * high)


def _undominated(rows: Sequence[Said]) -> Iterator[tuple[float, float]]:
    """Of what fits, in the order of memory, each that is faster than all that need less."""
    fastest = 0.0
    for memory, speed in sorted(_point(row) for row in rows if row["fits"] and row["tokens_per_second"]):
        if speed > fastest:
            fastest = speed
            yield memory, speed


@contextmanager
def _axes(salt: str, width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on, and where their SVG will be; sizes in inches."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {"svg.hashsalt": salt, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    drawing = io.StringIO()
    with mpl.rc_context(look):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), drawing
        figure.savefig(drawing, format="svg", metadata=METADATA)
