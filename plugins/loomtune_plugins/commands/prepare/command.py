"""The words behind `loomtune prepare`, and what it says while it works."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from loomtune.errors import Preempted, RunFailed, UserError
from loomtune_plugins.commands.words import parser, read

if TYPE_CHECKING:
    from loomtune_plugins.commands.prepare.job import Work

ENGINES = ("local", "ray")


def prepare(words: Sequence[str]) -> int:
    """Prepares, or goes on with it, or says that it was done."""
    options = read(_parser(), words)
    if options.workers < 0:
        raise UserError.of(f"--workers {options.workers} is no number of processes", "name 1 or more, or leave it out")
    from loomtune_plugins.commands.prepare import folder
    from loomtune_plugins.commands.prepare.composition import composed
    from loomtune_plugins.commands.prepare.job import Work
    from loomtune_plugins.commands.prepare.summary import summary
    from loomtune_plugins.commands.prepare.tasks import disk_fault

    with _stoppable():
        folder.refuse_others(options.out)
        job = composed(options.overrides, options.licence, options.dropped, options.config_dir)
        if folder.is_prepared(options.out, job):  # asked before anything is written, for it may be a read-only place
            print(f"{options.out} is already prepared, of the same inputs and settings")
            with contextlib.suppress(UserError), folder.locked(options.out):
                folder.tidy(options.out)
            return 0
        with folder.locked(options.out):
            try:
                manifest = _prepared(options, Work(folder.begun(options.out, job).absolute(), job))
            except OSError as error:
                raise RunFailed(str(disk_fault(error, options.out))) from error
            folder.tidy(options.out)
        summary(manifest, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    asked = parser("prepare", settings=False)
    asked.add_argument(
        "overrides",
        nargs="*",
        metavar="IN | key=value",
        help="files, patterns, folders; settings of data, stage, seed",
    )
    asked.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder, or one to go on with")
    asked.add_argument("--config-dir", action="append", default=[], help="a folder of your own Hydra configs")
    asked.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default: as cores and memory go")
    asked.add_argument("--engine", choices=ENGINES, default="local", help="where they are; the result is the same")
    asked.add_argument("--licence", default="", metavar="TEXT", help="what the manifest says of the rows' licence")
    asked.add_argument("--dropped", action="store_true", help="also write every dropped row, with where and why")
    return asked


def _prepared(options: argparse.Namespace, work: Work) -> dict[str, object]:
    from loomtune_plugins.commands.prepare import folder
    from loomtune_plugins.commands.prepare.engines import ENGINES as KINDS
    from loomtune_plugins.commands.prepare.engines import workers
    from loomtune_plugins.commands.prepare.flow import Flow
    from loomtune_plugins.commands.prepare.phases import Phases
    from loomtune_plugins.commands.prepare.summary import account, shown

    count = workers(options.workers, sum(stage.memory() for stage in work.stages.values()))
    engine = KINDS[options.engine](count)
    try:
        with shown(sys.stderr) as progress:
            files, manifest = Flow(work, Phases(work.folder, engine, progress), account).run()
    finally:
        engine.close()
    folder.publish(options.out, work.folder, files, manifest)
    return manifest


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end it between two instructions; what is committed is there for the next."""

    def leave(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # leaving is quick, and not to be left again
        raise Preempted("preparing was stopped; the same command goes on from where it was")

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
