"""What preparing says: how far it is, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loomtune_plugins.commands.prepare.manifest import reasons
from loomtune_plugins.commands.prepare.phases import Progress as Told

SECONDS = 10.0
"""Between two lines about how far it is, where nobody looks on."""


@contextmanager
def shown(stream: TextIO) -> Iterator[Told]:
    """Who is told how far it is: a bar where somebody looks on, else a line now and then."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield _Lines(stream)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream, self._said = stream, time.monotonic()

    def __call__(self, phase: str, done: int, tasks: int) -> None:
        if time.monotonic() - self._said > SECONDS:
            self._said = time.monotonic()
            print(f"{phase}: {done} of {tasks}", file=self._stream, flush=True)


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars, self._phase = bars, ""
        self._bar = bars.add_task("")

    def __call__(self, phase: str, done: int, tasks: int) -> None:
        if phase != self._phase:
            self._phase = phase
            self._bars.reset(self._bar, description=escape(phase), total=tasks)
        self._bars.update(self._bar, completed=done, total=tasks)


def summary(manifest: Mapping[str, Any], out: Path) -> None:
    """What became of the rows, on stdout, and where it is told in full."""
    account(manifest)
    told = escape(str(out / "manifest.json"))
    Console().print(f"\n{told} tells more; data=prepared data.path={escape(str(out))} reads it", soft_wrap=True)


def account(manifest: Mapping[str, Any]) -> None:
    """A table of what became of the rows, and what somebody should look at."""
    table = Table(title=f"{manifest['read']['records']:,} records", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    for name in ("in", "dropped", "out"):
        table.add_column(name, justify="right")
    table.add_column("why")
    read = manifest["read"]
    lost = sum(of["rows"] for of in read["dropped"].values())
    for one in ({"name": "read", "in": read["rows"] + lost, "out": read["rows"], **read}, *manifest["stages"]):
        changed = [f"changed: {one['changed']['rows']:,}"] if "changed" in one else []
        why = "; ".join([*(f"{count:,} {reason}" for reason, count in reasons(one)), *changed])
        table.add_row(one["name"], f"{one['in']:,}", f"{one['in'] - one['out']:,}", f"{one['out']:,}", escape(why))
    console = Console()
    console.print(table)
    for split, of in manifest["splits"].items():
        asked = f" ({of['actual']:.1%}, {of['asked']:.1%} was asked for)" if "asked" in of else ""
        console.print(f"{split}: {of['rows']:,} rows{asked}", highlight=False)
    for stage in manifest["stages"]:
        if largest := stage.get("found", {}).get("largest"):
            console.print(f"largest group of rows that hang together: {largest:,}", highlight=False)
        if cut := stage.get("found", {}).get("cut"):
            told = (
                f"{stage['name']}: {cut['keys']:,} keys are shared by very many rows; {cut['rows']:,} times a row was"
            )
            console.print(f"{told} compared with the first of them only", highlight=False)
    for warning in manifest["warnings"]:
        told = escape(f"warning: {warning['what']}\n    cure: {warning['cure']}")
        console.print(told, highlight=False, soft_wrap=True)
