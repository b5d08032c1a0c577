"""`loomtune train -m`, and `loomtune resume SWEEP`: from what was typed to the comparison."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from loomtune import api
from loomtune.compose import quoted
from loomtune.errors import Preempted, RunFailed, UserError
from loomtune_plugins.commands.compare.comparison import compared
from loomtune_plugins.commands.sweeps import engine
from loomtune_plugins.commands.sweeps.crew import Asked, places, tell
from loomtune_plugins.commands.sweeps.goal import Goal, chosen
from loomtune_plugins.commands.sweeps.items import DONE, Item, keep
from loomtune_plugins.commands.sweeps.request import Request, first, fixed, label
from loomtune_plugins.commands.sweeps.sweep import Sweep, composed

FILE = "sweep.json"
PATIENCE = 90.0
"""Seconds for items of a killed sweep to save and leave."""


def sweep(typed: Sequence[str], config_dirs: Sequence[str] = ()) -> int:
    """Runs a sweep to its end and compares its items; gives the exit code."""
    folders = [str(Path(folder).expanduser().absolute()) for folder in config_dirs]
    request = Request.read(typed, folders)
    made = engine.config(request)
    folder = _folder(made, request)
    settings = made.hydra.launcher
    shares = places(settings.jobs, settings.gpus)
    goal = _goal(made, request)
    engine.fit(made, request, goal, folder)
    _make(folder)
    with _locked(folder) as lock, Asked().listening() as asked:
        _note(folder, request)
        running = Sweep(
            folder,
            goal,
            asked,
            lock,
            request.config_dirs,
            retries=not engine.learns(made),
            places=shares,
            prune_after=settings.prune_after,
            fixed=fixed(request.words),
        )
        tell(f"the sweep is in {folder}; it is after the {goal.mode} of {goal.metric}")
        code = _run(made, request, running)
    compared([folder], folder, goal)
    return code


def again(folder: Path, more: Sequence[str]) -> int:
    """Goes on with a sweep by its own command. more: further words of Hydra's, such as `hydra.launcher.jobs=4`."""
    known = json.loads((folder / FILE).read_text())
    keys = {word.lstrip("+").partition("=")[0] for word in more} | {"hydra.sweep.dir"}
    kept = [word for word in known["words"] if word.lstrip("+").partition("=")[0] not in keys]
    return sweep([*kept, *more, f"hydra.sweep.dir={quoted(str(folder.absolute()))}"], known["config_dirs"])


def shown(typed: Sequence[str], config_dirs: Sequence[str] = ()) -> int:
    """Prints the items, and what is wrong with them; of a sweeper that learns, those it begins with. Starts nothing."""
    request = Request.read(typed, config_dirs)
    made = engine.config(request)
    places(made.hydra.launcher.jobs, made.hydra.launcher.gpus)
    goal, faulty = _goal(made, request), []
    with TemporaryDirectory() as scratch:
        engine.fit(made, request, goal, Path(scratch))
        same = fixed(request.words)

        def show(batch: Sequence[Sequence[str]]) -> list[Any]:
            for overrides in batch:
                item = Item(Path(scratch), tuple(overrides), goal, label=label(overrides, same))
                print(f"{item.name}  {item.label}")
                try:
                    composed(item, request.config_dirs)
                except UserError as error:
                    faulty.append(item)
                    print(f"    {error}")
            raise _Seen

        with suppress(_Seen):
            engine.run(made, request, show)
    print(f"the {goal.mode} of {goal.metric} is best")
    return 1 if faulty else 0


class _Seen(Exception):
    """The first batch was shown."""


def _run(made: DictConfig, request: Request, running: Sweep) -> int:
    try:
        engine.run(made, request, running)
    except Preempted as error:
        tell(str(error))
        return Preempted.exit_code
    except RunFailed as error:
        tell(f"the sweeper has had enough failures: {error}")
        return error.exit_code
    except UserError:
        raise
    except Exception as error:  # a sweeper's own, such as Optuna's where no trial came to a value
        if running.items and all(item.status in DONE and item.valued for item in running.items.values()):
            raise
        tell(f"the sweeper ended: {type(error).__name__}: {error}")
        return 1
    statuses = {item.status for item in running.items.values()}
    if "preempted" in statuses:
        return Preempted.exit_code
    return 0 if statuses <= set(DONE) else 1


def _folder(made: DictConfig, request: Request) -> Path:
    if request.set_by_hand("hydra.sweep.dir"):
        return Path(made.hydra.sweep.dir).expanduser().absolute()
    digest = hashlib.sha256(json.dumps([request.hydra, request.words]).encode()).hexdigest()
    return Path(f"sweeps/{time.strftime('%Y%m%d-%H%M%S')}-{digest[:8]}").absolute()


def _make(folder: Path) -> None:
    if (folder / "run.yaml").is_file():
        raise UserError.of(f"hydra.sweep.dir={folder} is the folder of a run", "name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError.of(f"hydra.sweep.dir={folder} cannot be made: {error.strerror}", "name another") from error


def _goal(made: DictConfig, request: Request) -> Goal:
    settings, sweeper = made.hydra.launcher, made.hydra.sweeper
    if settings.prune_after < 0:
        what = f"hydra.launcher.prune_after={settings.prune_after} is no number of steps"
        raise UserError.of(what, "set it to 1 or more, or to 0 for never")
    direction = str(sweeper.direction) if request.set_by_hand("hydra.sweeper.direction") else ""
    if "," in direction:
        raise UserError.of(f"hydra.sweeper.direction={direction} has several goals", "a sweep is after one metric")
    try:
        plan = api.compose(first([*engine.swept(made), *request.words]), request.config_dirs)
    except UserError:
        plan = None  # the first item has faults, which are told with it
    goal = chosen(settings.metric, settings.mode, direction.rpartition(".")[2], plan)
    measured = plan is not None and goal.metric in (plan.root.evaluate.best, "heldout_loss")
    if settings.prune_after and measured and plan is not None and not plan.root.evaluate.every:
        what = f"hydra.launcher.prune_after={settings.prune_after} goes by {goal.metric}, which is measured at the end"
        raise UserError.of(what, "set evaluate.every=<steps>, or hydra.launcher.metric=loss")
    return goal


def _note(folder: Path, request: Request) -> None:
    path = folder / FILE
    known = json.loads(path.read_text()) if path.is_file() else {"items": []}
    known |= {"words": [*request.words, *request.hydra], "config_dirs": list(request.config_dirs)}
    keep(path, known)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One sweep in a folder. The lock is its items' too: after a kill it is free when the last of them has left."""
    path = folder / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _await(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _await(descriptor: int, folder: Path) -> None:
    until, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode()
            if time.monotonic() > until or Path(f"/proc/{holder}").exists():
                cure = "wait for it, or set another hydra.sweep.dir"
                raise UserError.of(f"another sweep, process {holder}, runs in {folder}", cure) from None
        if not told:
            tell("items of the sweep before are still leaving")
            told = True
        time.sleep(0.2)
