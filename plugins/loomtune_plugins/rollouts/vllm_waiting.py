"""What one rank does in a thread, while all ranks wait for each other and hear who fails or asks to leave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from loomtune.errors import Fault, RunFailed, UserError
from loomtune.world import World
from loomtune_plugins.rollouts.vllm_http import Refused, Unanswered

LONGEST_PAUSE = 0.5
"""Seconds between two questions of a rank to the others; a collective that all come to must not wait longer."""


class Stale(Exception):
    """A server did not generate with the weights that it was given."""


class Task:
    """Work in a thread of its own, begun at once. result: what it gave."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(work,), daemon=True, name="vllm").start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except BaseException as error:
            self.error = error
        finally:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether it ended, well or not."""
        return self._done.is_set()

    def wait(self, seconds: float) -> None:
        """Until it ended, at most so long."""
        self._done.wait(seconds)


def together(world: World, heed: Callable[[], None], task: Task, cancel: Callable[[], None]) -> Any:
    """This rank's result once every rank's task has ended; called on every rank.

    Where one fails all raise the same: UserError, Stale or RunFailed. Ranks ask each other often, so that none of them
    waits in a collective for one whose server takes long. cancel: ends the work of this rank; called before anything is
    raised.
    """
    pause = 0.005
    try:
        while True:
            waiting, failed = world.total([not task.done, task.error is not None])
            if failed or not waiting:
                break
            heed()
            task.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if failed:
            _raise([told for told in world.gather(_told(task.error, world.rank)) if told])
    except BaseException:
        cancel()
        raise
    return task.result


def _told(error: BaseException | None, rank: int) -> tuple[str, Any] | None:
    """What a rank tells the others of its failure, in plain words."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return "user", [(fault.what, fault.cure) for fault in error.faults]
    where = f"rank {rank}: {error}"
    if isinstance(error, Stale):
        return "stale", where
    if isinstance(error, Unanswered):
        cure = "see the server's own log, start it again if it is gone, and resume the run; where it is only slow, set"
        return "failed", f"{where}\n    cure: {cure} rollout.patience higher, or rollout.parallel lower"
    if isinstance(error, Refused):
        return "failed", f"{where} (HTTP {error.status})\n    cure: see the server's own log"
    return "failed", f"rank {rank}: {type(error).__name__}: {error}"


def _raise(told: list[tuple[str, Any]]) -> None:
    """What a user can mend goes first; where many lost the same server, one is told."""
    by_kind = dict(reversed(told))
    if "user" in by_kind:
        raise UserError(*(Fault(*fault) for fault in by_kind["user"]))
    if "failed" in by_kind:
        raise RunFailed(f"the rollout failed on {by_kind['failed']}")
    raise Stale(by_kind["stale"])
