"""Rows spread over processes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from loomtune.beside import Beside
from loomtune.samples.making import Encoder, Item, Part
from loomtune.settings import from_environment

ALONE = 2.0
"""Seconds of tokenising before other processes are started, which takes about as long."""


def workers(most: int = 0) -> int:
    """How many processes tokenise: `$LOOMTUNE_WORKERS`, or as many as there are cores for this one, at most so many."""
    cores = len(os.sched_getaffinity(0))
    return int(from_environment("LOOMTUNE_WORKERS", min(cores, most or cores), least=1))


class Crew:
    """Tokenises batches of rows: in this process at first, in others once it has taken a while and they have begun.

    What comes of it, mistakes included, is the same whoever does it: a batch that cannot be sent to another process, or
    with which one fails, is done here.
    """

    def __init__(self, encoder: Encoder, most: int = 0) -> None:
        self._encoder, self._size, self._spent = encoder, workers(most), 0.0
        self._begun, self._told = list[Beside](), False
        self._members = list[Beside]()

    def parts(self, batches: Iterator[Sequence[Item]]) -> Iterator[Part]:
        """What each batch becomes, in their order."""
        while not self._members:
            if (batch := next(batches, None)) is None:
                return
            began = time.monotonic()
            part = self._encoder.part(batch)
            self._spent += time.monotonic() - began
            yield part
            self._gather()
        busy = deque[tuple[Beside, bool, Sequence[Item]]]()
        for turn, batch in enumerate(batches):
            done = self._done(*busy.popleft()) if len(busy) == len(self._members) else None
            member = self._members[turn % len(self._members)]
            busy.append((member, _given(member, batch), batch))
            if done is not None:
                yield done
        while busy:
            yield self._done(*busy.popleft())

    def close(self) -> None:
        """Ends the processes."""
        for member in self._begun:
            member.close()

    def _gather(self) -> None:
        """Starts the processes, says what they need once all listen, and takes on those that have it once all have."""
        if self._size > 1 and self._spent > ALONE and not self._begun:
            self._begun = [Beside("loomtune.samples.crew:serve") for _ in range(self._size)]
        if self._begun and all(member.pipe.poll() for member in self._begun):
            there = [member for member in self._begun if _answer(member)]
            if self._told:
                self._members, self._size = there, len(there)
            for member in [] if self._told else there:
                _given(member, self._encoder)
            self._told = True

    def _done(self, member: Beside, given: bool, batch: Sequence[Item]) -> Part:
        return (_answer(member) if given else None) or self._encoder.part(batch)


def serve(pipe: Connection) -> None:
    """What the other processes do."""
    pipe.send(True)
    encoder: Encoder = pipe.recv()
    pipe.send(True)
    while True:
        batch = pipe.recv()
        try:
            part = encoder.part(batch)
        except Exception:  # it will fail where it is seen
            part = None
        pipe.send(part)


def _given(member: Beside, thing: Any) -> bool:
    """Whether it could be sent: what cannot be pickled raises whatever it likes."""
    with suppress(Exception):
        member.pipe.send(thing)
        return True
    return False


def _answer(member: Beside) -> Any:
    """None where the process is gone."""
    with suppress(EOFError, OSError):
        return member.pipe.recv()
    return None
