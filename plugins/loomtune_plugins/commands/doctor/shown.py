"""The answer as a table and a list of findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log
from typing import Any

from loomtune_plugins.commands.doctor.findings import FAULT

NONE = "-"


def shown(said: Mapping[str, Any]) -> Iterator[str]:
    """Lines."""
    nodes = said.get("nodes", {})
    if nodes:
        yield from _table([["node", "ranks", *COLUMNS], *(_row(name, of) for name, of in nodes.items())])
        yield ""
    if said.get("collectives"):
        yield from _collectives(said["collectives"])
        yield ""
    for finding in said["findings"]:
        yield f"{finding['level']}: {finding['what']}"
        yield f"    cure: {finding['cure']}"
    faults = sum(finding["level"] == FAULT for finding in said["findings"])
    warnings = len(said["findings"]) - faults
    verdict = "sound" if said["sound"] else _counted(faults, "fault")
    came = f"{_counted(len(nodes), 'node')}, {_counted(said.get('size', 0), 'rank')}"
    yield f"{verdict}, {_counted(warnings, 'warning')}: {came}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "cores": lambda of: _scaled(of["cores"], 1, ""),
    "free memory": lambda of: _scaled((of["memory"] or {}).get("available"), 1 << 30, " GiB"),
    "run folder": lambda of: _disk(of, "run folder"),
    "cache": lambda of: _disk(of, "cache"),
    "/dev/shm": lambda of: _disk(of, "shared memory"),
    "clock": lambda of: f"{of['clock'][0] * 1e3 + 0.0:+.2f}±{of['clock'][1] * 1e3:.2f} ms" if of["clock"] else NONE,
    "GPUs": lambda of: f"{of['gpus'] or NONE}",
    "slowest": lambda of: _scaled(of["flops"], 1e12, " TFLOP/s"),
    "interface": lambda of: (of["interface"] or {}).get("gloo") or NONE,
    "to others": lambda of: _scaled(of["bandwidth"], 1e6, " MB/s"),
    "latency": lambda of: _scaled(of["latency"], 1e-6, " µs"),
}
"""What a node's row says under each heading."""


def _row(name: str, of: Mapping[str, Any]) -> list[str]:
    return [name, str(len(of["ranks"])), *(cell(of) for cell in COLUMNS.values())]


def _disk(of: Mapping[str, Any], place: str) -> str:
    at = (of["disks"] or {}).get(place)
    if at is None or "error" in at:
        return NONE
    return f"{_room(at['free'])}, {_scaled(at['written'], 1e6, ' MB/s')}"


def _room(free: int) -> str:
    return f"{free / (1 << 30):.0f} GiB" if free >= 1 << 30 else f"{free >> 20} MiB"


def _scaled(value: float | None, unit: float, name: str) -> str:
    return NONE if value is None else f"{value / unit:.3g}{name}" if value / unit < 100 else f"{value / unit:.0f}{name}"


def _collectives(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a size, the kinds side by side: time, and bus bandwidth as nccl-tests counts it."""
    kinds = list(dict.fromkeys((line["backend"], line["kind"]) for line in lines))
    rows = [["bytes", *(f"{kind} ({backend})" for backend, kind in kinds)]]
    sizes = dict.fromkeys(4 ** round(_power(line["bytes"])) for line in lines)
    for size in sorted(sizes):
        cells = []
        for kind in kinds:
            line = next((one for one in lines if _is(one, kind, size)), None)
            cells.append(f"{_time(line['seconds'])}  {_scaled(line['bus_bandwidth'], 1e6, ' MB/s')}" if line else NONE)
        rows.append([_bytes(size), *cells])
    yield from _table(rows)


def _is(line: Mapping[str, Any], kind: tuple[str, str], size: int) -> bool:
    return (line["backend"], line["kind"]) == kind and 4 ** round(_power(line["bytes"])) == size


def _power(size: int) -> float:
    """Of four: an all-gather's bytes are divided evenly among ranks, so they may be a little off."""
    return log(size, 4)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-2 else f"{seconds * 1e3:.0f} ms"


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
