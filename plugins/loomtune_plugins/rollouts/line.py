"""What two ranks of different worlds say to each other, and how one notices that the other is gone."""

from __future__ import annotations

import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from loomtune.errors import PeerLost
from loomtune.peers import lost
from loomtune.world import TIMEOUT

LONG = timedelta(days=999)
"""What may pass between two messages: an evaluation, a checkpoint, hours of training."""

PULSE = min(5.0, TIMEOUT.total_seconds() / 4)
"""Seconds between two signs of life."""


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


class Line:
    """Between two ranks, by gloo: whatever they compute on, words are on the CPU.

    A peer whose connection is closed is noticed at once, one that is silent after LOOMTUNE_TIMEOUT_MINUTES, whatever is
    waited for meanwhile: every call then raises PeerLost.
    """

    def __init__(self, store: dist.Store, me: int, peer: str) -> None:
        """me: 0 or 1. peer: the other one, as messages name it."""
        self.peer, self._me, self._gone, self._serving = peer, me, "", False
        ways = (("from 0", LONG), ("from 1", LONG), ("pulse", TIMEOUT))  # made in one order: each waits for the other
        groups: list[Any] = [dist.ProcessGroupGloo(dist.PrefixStore(n, store), me, 2, limit) for n, limit in ways]
        *self._from, self._pulse = groups
        self._length = torch.zeros(1, dtype=torch.int64)
        self._coming: Any = None
        threading.Thread(target=self._live, daemon=True, name="loomtune-line").start()

    def _live(self) -> None:
        """Tells the other side, as long as this process lives, that it does, and hears it from there."""
        try:
            while self._pulse.allreduce(torch.zeros(1)).wait():
                time.sleep(PULSE)
        except RuntimeError as error:
            self._gone = str(error)
            time.sleep(PULSE)
            if self._serving:
                os._exit(PeerLost.exit_code)

    @contextmanager
    def serves(self) -> Iterator[None]:
        """Within, this process ends with the other one, whatever it computes: it has no work of its own."""
        self._serving = True
        yield
        self._serving = False

    def say(self, thing: Any, unless: Callable[[], bool]) -> bool:
        """Says a plain object and waits until it is heard, which whoever is busy does later; False where it gave up."""
        content = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        works = [self._passed(tensor, self._me) for tensor in (torch.tensor([len(content)]), content)]
        return all(self._done(work, unless) for work in works)

    def hears(self, seconds: float) -> bool:
        """Whether there is something to hear, for which it waits so many seconds at most."""
        self._coming = self._coming or self._passed(self._length, 1 - self._me)
        return self._done(self._coming, after(seconds))

    def hear(self) -> Any:
        """What the other one says, for which it waits."""
        self.hears(math.inf)
        content, self._coming = torch.empty(int(self._length), dtype=torch.uint8), None
        self._done(self._passed(content, 1 - self._me), after(math.inf))
        return pickle.loads(content.numpy().tobytes())

    def check(self) -> None:
        """Raises PeerLost where the other one is gone."""
        if self._gone:
            raise lost(self.peer, self._gone)

    def _passed(self, tensor: torch.Tensor, root: int) -> Any:
        return self._from[root].broadcast(tensor, root)

    def _done(self, work: Any, unless: Callable[[], bool]) -> bool:
        """Waits until it is; False where it gave up."""
        while not (done := bool(work.is_completed())) and not self._gone and not unless():
            time.sleep(0.003)
        try:
            if done:
                work.wait()
        except RuntimeError as error:
            self._gone, done = str(error), False
        if not done:
            self.check()
        return done
