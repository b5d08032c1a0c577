"""What connects the ranks that train and those aside: words between two of them, weights to all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loomtune.errors import PeerLost, RunFailed
from loomtune.peers import lost
from loomtune.world import TIMEOUT, World
from loomtune_plugins.rollouts.line import Line, after

LEAVE = 10.0
"""Seconds in which a rank aside hears that it may go; one that is generating hears it between two pieces of work."""


class Links:
    """lines: of training's first rank, to each one aside; of one aside, to that; of other ranks, none.

    Weights go through the memory of hosts: a group of training's first rank and those aside, by gloo.
    """

    def __init__(self, store: dist.Store, rank: int, names: Sequence[str], ranks: int) -> None:
        """rank: among all, of which the last `ranks` are aside. names: of all, as messages have them."""
        training = len(names) - ranks
        self.aside, place = rank >= training, max(0, rank - training + 1)
        ends = [other for other in range(training, len(names)) if rank in (0, other)]
        self.lines = [
            Line(dist.PrefixStore(f"{end}", store), int(self.aside), names[0 if self.aside else end]) for end in ends
        ]
        if self.lines:
            self._weights: Any = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), place, ranks + 1, TIMEOUT)

    def say(self, things: Sequence[Any]) -> None:
        """Of training's first rank: one thing to each of those aside."""
        for line, thing in zip(self.lines, things, strict=True):
            line.say(thing, after(float("inf")))

    def ready(self, seconds: float) -> bool:
        """Whether all of those aside have something to say, each waited for so many seconds at most."""
        return all(line.hears(seconds) for line in self.lines)

    def hear(self) -> list[Any]:
        """What each of those aside says. Raises RunFailed where one could not do what it was to."""
        found = [line.hear() for line in self.lines]
        for line, said in zip(self.lines, found, strict=True):
            if isinstance(said, Failed):
                raise RunFailed(f"{line.peer}, which generates, failed of {said.why}; its own log says more")
        return found

    def check(self) -> None:
        """Raises PeerLost where one of the others is gone."""
        for line in self.lines:
            line.check()

    def send(self, tensors: Iterable[tuple[str, Tensor]], names: Sequence[str], world: World) -> None:
        """Sends what all ranks that train gather: tensors of these names, in their order."""
        for wanted, (name, tensor) in zip(names, tensors, strict=True):
            assert name == wanted, "an engine streams its parameters in the order of the module"
            if world.leads:
                self._pass(tensor.cpu().contiguous())

    def receive(self, shape: Sequence[int]) -> Tensor:
        """The next one that is sent, in fp32 on the CPU."""
        tensor = torch.empty(tuple(shape))
        self._pass(tensor)
        return tensor

    def _pass(self, tensor: Tensor) -> None:
        try:
            self._weights.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise lost(" or ".join(line.peer for line in self.lines), str(error)) from error

    def close(self) -> None:
        """Lets those aside go; at the end of training, however it came."""
        if not self.aside:
            for line in self.lines:
                with suppress(PeerLost):
                    line.say(None, after(LEAVE))


@dataclass(frozen=True, slots=True)
class Failed:
    """What a rank aside says in the place of completions. why: what it failed of."""

    why: str
