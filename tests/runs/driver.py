"""One rank of a world that stays joined and runs one plan after another.

Starting processes and importing torch takes seconds, a plan of this size a fraction of one. So a server imports
once and forks ranks, and a rank runs every plan that its world is given.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "peft",
    "loomtune.assembly",
    "loomtune.loop",
    "loomtune.worker",
    "loomtune_plugins.models.huggingface",
    "loomtune_plugins.shardings.ddp",
    "loomtune_plugins.shardings.fsdp",
]
"""Modules that the server imports for all ranks. None of them may start a thread or touch a device."""


Work = Callable[[Path, Any], dict[str, Any]]
"""What a rank does with a prepared folder, in its world; gives a result with `metrics`. At the top of a module."""


def serve(jobs: Connection, place: dict[str, str], log: Path) -> None:
    """Joins the world that the environment `place` describes; answers each job with its run's result or error.

    A job is a folder, and what is to be done with it in the place of running its plan, or None.
    """
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(place)
    from loomtune import world as worlds

    world = worlds.join()
    while (job := jobs.recv()) is not None:
        jobs.send(_answer(*job, world))
        gc.collect()
    worlds.leave()


def _answer(folder: Path, work: Work | None, world: Any) -> dict[str, Any]:
    from loomtune.plan import Plan
    from loomtune.worker import execute

    try:
        return {"result": work(folder, world) if work else execute(Plan.load(folder), folder, world)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
