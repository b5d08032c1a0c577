"""Each rank: `torchrun ... -m loomtune_plugins.commands.doctor.rank DIR [quick] [seconds=N] [nodes=N procs=N]`.

By words, not by options: torchrun takes what looks like the beginning of an option of its own for that. nodes, procs:
how many were asked for, where torchrun may have started with fewer. `quiet`: somebody else shows the answer.
`launched`: somebody else gives the exit code, so that torchrun does not take faults for a failure of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from loomtune.errors import Preempted
from loomtune_plugins.commands.doctor import report
from loomtune_plugins.commands.doctor.board import Board, met
from loomtune_plugins.commands.doctor.phases import Patient, clear, examine
from loomtune_plugins.commands.doctor.shown import shown

DEFAULT_SECONDS = 600
HARD = 30
"""Seconds after its time at which a rank ends, whatever it waits for."""

COMING = 120
"""Seconds at most that rank 0 waits for the others: a slow file system gives libraries to some much later."""


ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""How launchers, schedulers and agents ask a rank to leave."""


class Asked(Exception):
    """This rank was told to end."""


def main(words: list[str]) -> int:
    """Examines; rank 0 writes DIR/doctor.json. Gives 1 on rank 0 where something is wrong, and where rank 0 is lost."""
    _die_with_parent()
    asked = dict(word.partition("=")[::2] for word in words[1:])
    seconds = float(asked.get("seconds") or DEFAULT_SECONDS)
    one = Patient(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        folder=Path(words[0]).absolute(),
        quick="quick" in asked,
        until=time.monotonic() + seconds,
    )
    _bound(seconds + HARD, lambda: _answered(one, asked, "the time was over"))
    for number in ASKS:
        signal.signal(number, _told)
    try:
        _examine(one, min(COMING, seconds / 4))
    except Asked as error:
        print(f"loomtune doctor: rank {one.rank}: {error}", file=sys.stderr, flush=True)
        clear(one)
        _answered(one, asked, str(error), settle="launched" not in asked)
        return Preempted.exit_code if "launched" in asked else 1
    except (TimeoutError, RuntimeError) as error:  # RuntimeErrors are the store's, when rank 0 is gone
        print(f"loomtune doctor: rank {one.rank}: {error}", file=sys.stderr, flush=True)
        return _answered(one, asked, str(error))
    return _answered(one, asked)


def _answered(one: Patient, asked: Mapping[str, str], ended: str = "", *, settle: bool = True) -> int:
    """Rank 0 writes the answer, or as much as it has. ended: why the examination was not finished.

    settle: whether it is also the job's result, which is else for the agent to write, who knows what came first.
    """
    if one.rank or not one.nodes:
        return int(bool(ended))
    if ended:
        one.troubles.append({"phase": "the examination was not finished", "ranks": [0], "error": ended})
    expected = {name: int(asked[name]) for name in ("nodes", "procs") if asked.get(name)}
    said = report.made(one.answers, one.troubles, size=one.size, expected=expected)
    return _written(said, one.folder, asked, settle=settle)


def _examine(one: Patient, coming: float) -> None:
    ours, of_group = met(one.rank, one.size, max(10.0, coming))
    board = Board(ours, one.rank)
    examine(one, board, of_group, coming)
    board.post("left", True)
    if one.rank == 0:
        board.gather("left", one.ranks, 3)  # our end takes the store with it


def _written(said: dict[str, Any], folder: Path, asked: Mapping[str, str], *, settle: bool) -> int:
    quiet = "quiet" in asked
    try:
        report.write(said, folder)
        if settle:
            report.settle(said, folder)
    except OSError as error:
        print(f"loomtune doctor: {folder} cannot be written to: {error}", file=sys.stderr, flush=True)
        quiet = False
    if not quiet:
        print("\n".join(shown(said)), flush=True)
    return 0 if said["sound"] or "launched" in asked else 1


def _told(number: int, frame: object) -> NoReturn:
    for other in ASKS:
        signal.signal(other, signal.SIG_IGN)  # once is enough: what is known is being written
    raise Asked(f"it was asked to end ({signal.Signals(number).name}), as when another rank ended, or by Ctrl-C")


def _bound(seconds: float, answered: Callable[[], int]) -> None:
    """Ends this process at that time, whatever it waits for."""
    hard = threading.Timer(seconds, lambda: os._exit(answered()))
    hard.daemon = True
    hard.start()


def _die_with_parent() -> None:
    """Ends with torchrun, however that ends: its ranks live in sessions of their own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of gloo, or of a step that hangs, would keep the interpreter
