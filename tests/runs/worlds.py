"""Worlds of real processes that run many plans, one after another."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from loomtune import api
from loomtune_plugins.measured import OF_USE
from loomtune_plugins.trackers import metrics
from runs.driver import PRELOADED, Work, serve

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)

PATIENCE = 600.0
"""Seconds for one run on a busy machine; what is not done by then hangs."""

MEASURED = frozenset({"seconds", "tokens_per_second", "memory_bytes"})
MEASURED |= {"rollout_seconds", "reward_seconds", "read_seconds", "rollout_tokens_per_second"}
"""Metrics that differ from one attempt to the next, with those of `clocked`."""


def clocked(name: str) -> bool:
    """Whether a clock or an allocator said it."""
    return name in MEASURED or name.startswith(OF_USE)


@dataclass(frozen=True)
class Outcome:
    """A run that has ended. result: as in `result.json`."""

    folder: Path
    result: dict[str, Any]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """`metrics.jsonl` without what was measured with a clock."""
        return maths(self.folder)

    def series(self, name: str) -> list[float]:
        """A metric at every step that has it."""
        return [line[name] for line in self.lines if name in line]


def maths(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that must not depend on time or memory."""
    return [{key: value for key, value in line.items() if not clocked(key)} for line in metrics.read(folder)]


class Failed(Exception):
    """A run that ended with an error; `errors` holds the name and message of each rank's."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        super().__init__(errors)
        self.errors = errors


@dataclass
class World:
    """Processes of one joined group, started once for all tests."""

    size: int
    log: Path
    ranks: list[tuple[BaseProcess, Connection]] = field(default_factory=list)

    def start(self) -> None:
        """Starts the processes; they join while the first plan is composed."""
        port = str(free_port())
        for rank in range(self.size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOOMTUNE_TIMEOUT_MINUTES": "9"}
            here, there = SERVER.Pipe()
            process = SERVER.Process(target=serve, args=(there, place, self.log), daemon=True)
            process.start()
            there.close()
            self.ranks.append((process, here))

    def run(self, folder: Path, work: Work | None = None) -> Outcome:
        """Runs the plan of a prepared folder, or other work with it. Raises Failed where ranks answer with errors."""
        if not self.ranks:
            self.start()
        for _, jobs in self.ranks:
            jobs.send((folder, work))
        answers = [self._answer(jobs) for _, jobs in self.ranks]
        if errors := [(answer["error"], answer["message"]) for answer in answers if "error" in answer]:
            raise Failed(errors)
        results = [answer["result"] for answer in answers]
        assert all(_lasting(result) == _lasting(results[0]) for result in results), "ranks disagree about the result"
        return Outcome(folder, results[0])

    def _answer(self, jobs: Connection) -> dict[str, Any]:
        began = time.monotonic()
        try:
            while time.monotonic() - began < PATIENCE:
                if jobs.poll(1):
                    answer: dict[str, Any] = jobs.recv()
                    return answer
                if any(process.exitcode is not None for process, _ in self.ranks):
                    break  # the others would wait for it until their time is out
        except (EOFError, ConnectionError):
            pass
        self.stop()
        raise RuntimeError(f"a rank of {self.size} gave no answer; the log ends:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """Ends the processes."""
        for process, jobs in self.ranks:
            process.kill()
            process.join()
            jobs.close()
        self.ranks = []


class Worlds:
    """A world of each size, started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worlds: dict[int, World] = {}

    def of(self, size: int) -> World:
        """The world of that many processes."""
        if size not in self.worlds:
            self.worlds[size] = World(size, self.folder / f"world-{size}.log")
            self.worlds[size].start()
        return self.worlds[size]

    def train(self, size: int, overrides: Sequence[str], folder: Path, work: Work | None = None) -> Outcome:
        """What `loomtune train` does, on a world that is there already. work: what ranks do instead."""
        world = self.of(size)
        plan = api.compose([*overrides, f"run.dir='{folder}'"], processes=size)
        api.check(plan)
        return world.run(api.prepare(plan), work)

    def resume(self, size: int, folder: Path, *overrides: str) -> Outcome:
        """What `loomtune resume` does, on a world that is there already."""
        world = self.of(size)
        plan = api.resumed(folder, [*overrides, f"launcher.procs={size}"])
        api.check(plan)
        return world.run(api.prepare(plan))

    def stop(self) -> None:
        """Ends all processes."""
        for world in self.worlds.values():
            world.stop()


def _lasting(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what each rank measures for itself."""
    return result | {"metrics": {key: value for key, value in result["metrics"].items() if not clocked(key)}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
