"""Live bytes by storage, as an allocator counts them: from the first tensor that has it until the last one dies."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from loomtune.toolkit.placing import HOSTED
from loomtune_plugins.planner.trace import Peak


@dataclass(slots=True)
class _Held:
    """A storage that lives. reference: to it, whose death is heard of by that."""

    bytes: int
    cause: str
    reference: weakref.ref[torch.UntypedStorage]
    place: str


class Memory:
    """What is live, by cause, and the peak of each moment.

    rounding: bytes of which the allocator gives out multiples. moment: what is being done. causes: live bytes by cause.
    """

    def __init__(self, rounding: int = 1) -> None:
        self.rounding = rounding
        self.moment = "birth"
        self.total = 0
        self.causes: dict[str, int] = defaultdict(int)
        self.host: dict[str, int] = defaultdict(int)
        self.moments: dict[str, Peak] = {}
        self._held: dict[int, _Held] = {}
        self._fresh: list[int] = []

    def at(self, moment: str) -> None:
        """Goes on to a moment, in which what lives now counts."""
        self.moment = moment
        self._peak()

    def begin(self) -> None:
        """Forgets what was new: see `settle`."""
        self._fresh.clear()

    def settle(self, before: str, cause: str) -> None:
        """What was allocated since `begin` for one cause, and lives, has another now."""
        for key in self._fresh:
            held = self._held.get(key)
            if held is not None and held.cause == before:
                self._move(held, cause)
        self._fresh.clear()

    def see(self, tensor: Tensor, cause: str) -> bool:
        """Counts a tensor's storage, unless it is known; True where it is new."""
        part = plain(tensor)
        storage = part.untyped_storage()
        key = storage._cdata
        if key in self._held or part.device.type == "meta":
            return False
        held = _Held(0, cause, weakref.ref(storage, lambda _: self._dead(key)), "host" if HOSTED.get() else "")
        self._held[key] = held
        self._fresh.append(key)
        self._grow(held, self._rounded(storage.nbytes()))
        return True

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage is counted."""
        return plain(tensor).untyped_storage()._cdata in self._held

    def label(self, tensors: Iterable[Tensor | None], cause: str, place: str = "") -> None:
        """Says what tensors are there for, and that they lie on the `host`, where they do."""
        for tensor in tensors:
            if tensor is not None:
                self.see(tensor, cause)
                assert plain(tensor).device.type != "meta", "it was given storage"
                held = self._held[plain(tensor).untyped_storage()._cdata]
                self._move(held, cause, place or held.place)

    def cause(self, tensor: Tensor) -> str:
        """What a tensor is there for; empty where it is not known."""
        held = self._held.get(plain(tensor).untyped_storage()._cdata)
        return held.cause if held else ""

    def keep(self, count: int, cause: str) -> None:
        """Counts bytes that nobody gives back."""
        self.causes[cause] += count
        self.total += count

    def within(self, count: int, cause: str) -> None:
        """Counts bytes that live no longer than an operation, beside what it gave."""
        if count:
            self.keep(self._rounded(count), cause)
            self._peak()
            self.keep(-self._rounded(count), cause)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size now; only what gathers parameters frees and fills one."""
        held = self._held.get(storage._cdata)
        if held is not None:
            self._grow(held, self._rounded(storage.nbytes()) - held.bytes)
            self._move(held, "gathered")

    def _rounded(self, count: int) -> int:
        return -(-count // self.rounding) * self.rounding

    def _move(self, held: _Held, cause: str, place: str = "") -> None:
        if (held.cause, held.place) == (cause, place):
            return
        count = held.bytes
        self._grow(held, -count)
        held.cause, held.place = cause, place
        self._grow(held, count)

    def _grow(self, held: _Held, count: int) -> None:
        held.bytes += count
        if held.place == "host":
            self.host[held.cause] += count
            return
        self.causes[held.cause] += count
        self.total += count
        if count > 0:
            self._peak()

    def _dead(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._grow(held, -held.bytes)

    def _peak(self) -> None:
        known = self.moments.get(self.moment)
        if known is None or self.total >= known.bytes:
            self.moments[self.moment] = Peak(self.total, {name: n for name, n in self.causes.items() if n})


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
