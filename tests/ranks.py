"""Functions that run on every rank of a small group, for what one process cannot show."""

from __future__ import annotations

import importlib.util
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from runs.driver import PRELOADED

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)

PATIENCE = 600.0


def together(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` gives on each rank of a joined group; fails with the first rank's error.

    function: at the top of a file, which every rank imports. folder: where the ranks meet.
    """
    place = (Path(function.__code__.co_filename), function.__name__)
    meeting, started = folder / f"meeting-{function.__name__}-{len(list(folder.iterdir()))}", []
    for rank in range(size):
        here, there = SERVER.Pipe()
        process = SERVER.Process(target=_rank, args=(there, rank, size, meeting, place, arguments), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    try:
        answers = [_answer(here) for _, here in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()
    assert not (errors := [answer["error"] for answer in answers if "error" in answer]), "\n".join(errors)
    return [answer["gave"] for answer in answers]


def _answer(here: Connection) -> dict[str, Any]:
    """A rank's answer; one that hangs or dies has none."""
    try:
        found: dict[str, Any] = here.recv() if here.poll(PATIENCE) else {"error": "a rank gave no answer in time"}
    except EOFError:
        found = {"error": "a rank died"}
    return found


def _rank(
    there: Connection, rank: int, size: int, meeting: Path, place: tuple[Path, str], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        function = getattr(_imported(place[0]), place[1])
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        there.send({"gave": function(*arguments)})
        dist.barrier()
    except Exception:
        there.send({"error": traceback.format_exc()})


def _imported(file: Path) -> ModuleType:
    """A test's file as a module: pytest gives it a name that other processes do not know."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
