"""Lists of tasks, carried out as far as they are not done; what came of each stays when its files are gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from loomtune_plugins.commands.prepare.engines import Engine, Task
from loomtune_plugins.commands.prepare.parts import STATS, read_json, write_json
from loomtune_plugins.commands.prepare.refining import DROPPED
from loomtune_plugins.commands.prepare.tasks import raise_for

DONE = "done.json"


class Progress(Protocol):
    """Who is told how far it is."""

    def __call__(self, phase: str, done: int, tasks: int) -> None:
        """So many tasks of a phase are done."""


class Phases:
    """Those of one work folder, each a folder in it with one for each of its tasks."""

    def __init__(self, folder: Path, engine: Engine, progress: Progress) -> None:
        self.folder, self._engine, self._progress = folder, engine, progress

    def run(self, label: str, name: str, tasks: Sequence[Task], result: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a phase: as it is kept, or once all its tasks are done."""
        folder = self.folder / name
        if not self.is_done(name):
            folder.mkdir(exist_ok=True)
            for draft in folder.glob(".*"):
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            at = {"folder": str(self.folder)}
            self._carry_out(label, [{**task, **at, "place": f"{name}/{number}"} for number, task in enumerate(tasks)])
            write_json(folder / DONE, result())
        return self.result(name)

    def is_done(self, name: str) -> bool:
        """Whether a phase is over."""
        return (self.folder / name / DONE).exists()

    def result(self, name: str) -> dict[str, Any]:
        """Of a phase that is over."""
        done: dict[str, Any] = read_json(self.folder / name / DONE)
        return done

    def stats(self, name: str, count: int) -> list[dict[str, Any]]:
        """What each task of a phase told of its work."""
        folder = self.folder / name
        return [{"part": str(number), **read_json(folder / str(number) / STATS)} for number in range(count)]

    def total(self, name: str, count: int) -> dict[str, int]:
        """The sums of what they told."""
        total = dict[str, int]()
        for stats in self.stats(name, count):
            for key, value in without(stats, "part").items():
                total[key] = total.get(key, 0) + value
        return total

    def shrink(self, *names: str) -> None:
        """Takes away the files of phases that nothing reads any more; what was dropped is asked for at the end."""
        for name in names:
            for path in (self.folder / name).glob("*/*"):
                if path.name != DROPPED:
                    path.unlink()

    def _carry_out(self, label: str, tasks: Sequence[Task]) -> None:
        left = [task for task in tasks if not (self.folder / task["place"]).is_dir()]
        done = len(tasks) - len(left)
        self._progress(label, done, len(tasks))
        for answer in self._engine.carry_out(left) if left else ():
            raise_for(answer)
            done += 1
            self._progress(label, done, len(tasks))


def without(told: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """All but these."""
    return {name: value for name, value in told.items() if name not in keys}
