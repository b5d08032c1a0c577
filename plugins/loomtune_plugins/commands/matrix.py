"""`loomtune matrix`: the cells as a table, or as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from loomtune.plan import Finding
from loomtune_plugins.commands.cells import PROCESSES, Cell, cells
from loomtune_plugins.commands.words import parser, read


def matrix(words: Sequence[str]) -> int:
    """Prints what goes with what."""
    asked = parser("matrix")
    world = "world size of the shardings that run on several"
    asked.add_argument("--processes", type=int, default=PROCESSES, help=world)
    asked.add_argument("--json", action="store_true")
    options = read(asked, words)
    found = list(cells(options.overrides, options.processes))
    described = {"processes": options.processes, "cells": [cell.described() for cell in found]}
    print(json.dumps(described, indent=1) if options.json else "\n".join(shown(found)))
    return 0


def shown(found: Iterable[Cell]) -> Iterator[str]:
    """Lines of text: a table for each objective, shardings down and adapters across, then the reasons by number."""
    numbers: dict[Finding, int] = {}
    for objective, of_objective in itertools.groupby(found, lambda cell: " ".join(cell.choices["objective"].typed)):
        rows: dict[str, list[str]] = {objective: []}
        for cell in of_objective:
            row = rows.setdefault(" ".join(cell.choices["sharding"].typed), [])
            row.append(_word(cell, numbers))
            if cell.choices["adapter"].label not in rows[objective]:
                rows[objective].append(cell.choices["adapter"].label)
        left, width = max(map(len, rows)), max(len(text) for row in rows.values() for text in row)
        for name, row in rows.items():
            yield "  ".join([f"{name:<{left}}", *(f"{text:<{width}}" for text in row)]).rstrip()
        yield ""
    yield from (f"[{number}] {fault.what}\n    cure: {fault.cure}" for fault, number in numbers.items())


def _word(cell: Cell, numbers: dict[Finding, int]) -> str:
    if cell.status == "needs":
        return f"needs {', '.join(cell.extras)}"
    told = [str(numbers.setdefault(fault, len(numbers) + 1)) for fault in cell.faults]
    return f"refused [{','.join(told)}]" if told else "works"
