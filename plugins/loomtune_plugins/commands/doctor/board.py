"""What ranks tell rank 0 and hear from it, over the rendezvous' store: the one link that must work."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PAUSE = 0.1
"""Seconds between two looks: a wait within the store would not hear of signals, and prints when it ends in vain."""

SLICE = 1.0
"""Seconds of one wait for a thread, between which Python hears of signals."""


class Board:
    """A store with plain data by name. Nothing waits longer than it was told."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self.rank = store, rank

    def post(self, name: str, thing: Any) -> None:
        """Says something once."""
        self.store.set(f"{name}/{self.rank}", json.dumps(thing))

    def gather(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """What those ranks posted that did so in time."""
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        if not self._there(list(keys.values()), seconds):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items()}

    def hear(self, name: str, rank: int, seconds: float) -> Any:
        """What a rank posted. Raises TimeoutError."""
        if not self._there([f"{name}/{rank}"], seconds):
            raise TimeoutError(f"rank {rank} said nothing of {name} within {seconds:.0f} s")
        return json.loads(self.store.get(f"{name}/{rank}"))

    def _there(self, keys: list[str], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > until:
                return False
            time.sleep(PAUSE)
        return True


def met(rank: int, size: int, seconds: float) -> tuple[dist.Store, dist.Store]:
    """The store of the ranks that torchrun (or a scheduler in its manner) started, with keys of this start alone.

    Twice, over connections of their own: one that waits does not block the other.
    """
    if size == 1:
        alone = dist.HashStore()
        return alone, alone
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and not shared
    store = dist.TCPStore(host, port, size, is_master=hosts, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    start = f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{size}"
    other: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch 2.13's stubs lack it
    return dist.PrefixStore(start, store), dist.PrefixStore(start, other)


def within(seconds: float, work: Callable[[], Any]) -> dict[str, Any]:
    """`value` of some work, or its `error`; `late` where it is not done in time, and is left to itself."""
    answer: dict[str, Any] = {}

    def carry_out() -> None:
        try:
            answer["value"] = work()
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"

    worker = threading.Thread(target=carry_out, daemon=True)
    worker.start()
    until = time.monotonic() + seconds
    while worker.is_alive() and (left := until - time.monotonic()) > 0:
        worker.join(min(SLICE, left))  # in slices, so that signals are heard
    return dict(answer) or {"late": f"not done within {seconds:.0f} s"}
