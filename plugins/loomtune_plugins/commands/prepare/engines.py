"""Where tasks are carried out: by processes of this machine, or by those of a Ray cluster. The result is the same."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from loomtune.errors import RunFailed, UserError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""What keeps libraries to one thread a process: the processes have all cores, and sums do not hang on the machine."""

Task = dict[str, Any]

_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Where nobody else reaches a cluster of this machine's own. Ray 2.60 takes 127.0.0.1 for the public address."""

_PROCESS = 200 << 20
"""Bytes that a process needs beside what stages ask for."""


class Engine(Protocol):
    """What carries out tasks."""

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """What each task answers, as soon as it does."""

    def close(self) -> None:
        """Ends its processes at once, done or not."""


def workers(asked: int, memory: int) -> int:
    """How many processes there may be: one a core, as memory goes. memory: bytes that the stages of each need."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = int(psutil.virtual_memory().available * 0.7) // (_PROCESS + memory)
    return asked or max(1, min(cores, fitting))


class Local:
    """A pool of processes, which end with this one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[Task]:
        from loomtune_plugins.commands.prepare.tasks import carry_out

        self._pool = self._pool or _pool(self._count)
        try:
            for done in as_completed([self._pool.submit(carry_out, task) for task in tasks]):
                yield done.result()
        except BrokenProcessPool as error:
            told = "a process ended in the middle of its work, perhaps for want of memory"
            raise RunFailed(f"{told}\n    cure: the same command goes on; --workers N asks for fewer") from error

    def close(self) -> None:
        if self._pool:
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)


class Ray:
    """Ray Data over a cluster: one task a block. The folder must be seen by all of its nodes.

    nodes: how many tasks each of them carried out.
    """

    def __init__(self, count: int) -> None:
        try:
            import ray.data
        except ImportError as error:
            raise UserError.of(
                "--engine ray needs Ray", "pip install 'loomtune[ray]', or leave --engine out"
            ) from error
        self.nodes = Counter[str]()
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(count)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False

    def carry_out(self, tasks: Sequence[Task]) -> Iterator[Task]:
        import json

        import ray.data

        items = [{"task": json.dumps(task), "home": str(Path.cwd())} for task in tasks]
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        for done in blocks.map(_on_a_node).iter_rows():
            self.nodes[done["node"]] += 1
            yield json.loads(done["answer"])

    def close(self) -> None:
        import ray

        if self._ours:
            ray.shutdown()


ENGINES: dict[str, Any] = {"local": Local, "ray": Ray}


def _pool(count: int) -> ProcessPoolExecutor:
    # Not forked: what this process has loaded may have threads.
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    """Of a process of the pool: one thread, no answer to Ctrl-C, which is the parent's, and no life after it."""
    os.environ.update(dict.fromkeys(THREADS, "1"), TOKENIZERS_PARALLELISM="false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _connect(count: int) -> None:
    """To the cluster that RAY_ADDRESS names, or to one of this machine's own that nobody else reaches."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it tells of each phase, and where its own logs are
    environment = {**dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
    common: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": False}
    common["logging_level"] = logging.WARNING
    if address := os.environ.get("RAY_ADDRESS"):
        host = address.rpartition(":")[0]
        ray.init(address=address, _node_ip_address=host if host.startswith("127.") else None, **common)
        return
    store: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
    ray.init(address="local", num_cpus=count, _node_ip_address=_LOOPBACK, **store, **common)


def _on_a_node(item: dict[str, Any]) -> dict[str, str]:
    import json

    import ray

    from loomtune_plugins.commands.prepare.tasks import carry_out

    os.chdir(item["home"])  # paths may be relative
    answer = json.dumps(carry_out(json.loads(item["task"])))
    return {"answer": answer, "node": ray.get_runtime_context().get_node_id()}
