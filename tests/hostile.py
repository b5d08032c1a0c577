"""Reads files of doubtful origin within limits of time and memory, and prints what came of each.

A program of its own, because a limit of memory holds for a whole process: `python hostile.py < CASES`, one case a line,
`{"data": ..., "settings": {...}}`. Memory is that of addresses, counted from what the libraries take.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - what libraries take is not held against a file
import pyarrow.parquet
import zstandard  # noqa: F401

from loomtune.contracts import Data, Dropped
from loomtune.errors import UserError
from loomtune_plugins.data import datas

MEMORY = 500 << 20
SECONDS = 10


def main() -> None:
    """Answers each line with a line."""
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY, addresses + MEMORY))
    for line in sys.stdin:
        case = json.loads(line)
        begun = time.monotonic()
        outcome = {"strict": _said(_strict, case), "kept": _said(_kept, case)}
        print(json.dumps({**outcome, "seconds": time.monotonic() - begun}), flush=True)


def _said(read: Callable[[Data], Any], case: dict[str, Any]) -> Any:
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        return read(_data(case))
    except UserError as error:
        return str(error)
    finally:
        signal.alarm(0)


def _late(*_: object) -> None:
    sys.exit(f"it took more than {SECONDS} seconds")


def _data(case: dict[str, Any]) -> Data:
    (offer,) = [offer for offer in datas() if offer.name == case["data"]]
    module, _, name = offer.build.partition(":")
    data: Data = getattr(import_module(module), name)(offer.schema(**case["settings"]))
    return data


def _strict(data: Data) -> int:
    data.check()
    return sum(1 for _ in data.rows("train"))


def _kept(data: Data) -> dict[str, Any]:
    """How many rows, and of the others how many for each reason, with the first few of them."""
    found = (one for piece in data.pieces("train") for one in data.read(piece))
    rows, reasons, first = 0, Counter[str](), list[tuple[str, str, str]]()
    for one in found:
        if not isinstance(one, Dropped):
            rows += 1
            continue
        reasons[one.reason] += 1
        if len(first) < 5:
            first.append((one.origin, one.reason, one.detail[:200]))
    return {"rows": rows, "reasons": reasons, "first": first}


if __name__ == "__main__":
    main()
