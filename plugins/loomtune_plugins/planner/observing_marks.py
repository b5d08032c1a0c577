"""Moments: where in its step a run is, by what blocks and heads are at work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loomtune_plugins.planner.observing import Observer

if TYPE_CHECKING:
    from loomtune.run import Run


class Marks:
    """Follows a run through its phases and blocks, and tells the observer.

    A moment is named `phase:part`: `start`, `first` block, `middle` ones, `last`, `head`. In each, blocks
    of a deeper model add evenly to what lives: where one grew and then fell, its peak would move.
    """

    def __init__(self, observer: Observer, run: Run, times: Sequence[float], hosted: bool = False) -> None:
        """times: for how many of the step's micro-batches each one stands that is rehearsed. hosted: as in `label`."""
        self.observer, self.run, self.times, self.hosted = observer, run, times, hosted
        self.counts, self.passes = False, 0
        self._handles: list[Any] = []

    def begin(self, counts: bool) -> None:
        """A step begins. counts: whether what it sends and computes is kept."""
        self.counts, self.passes = counts, 0

    @contextmanager
    def following(self) -> Iterator[Marks]:
        """Within it moments are told."""
        self.run.phases.listeners.append(self._phase)
        for name, role in self.run.roles.items():
            self._follow("" if role.trained and name == "policy" else f"{name}.", role.engine)
        try:
            yield self
        finally:
            self.run.phases.listeners.remove(self._phase)
            for handle in self._handles:
                handle.remove()

    def _follow(self, who: str, engine: Any) -> None:
        network = engine.network
        if getattr(network, "_rehearsal_followed", False):
            return
        network._rehearsal_followed = True
        blocks = engine.spec.model.blocks(network.base)
        for index, block in enumerate(blocks):
            part = "first" if index == 0 else "last" if index == len(blocks) - 1 else "middle"
            self._handles += [
                block.register_forward_pre_hook(lambda *_, p=part: self._enter(who, p)),
                block.register_forward_hook(lambda m, a, out, p=part: self._leave(who, p, out)),
            ]
        self._handles.append(network.reading.register_forward_pre_hook(lambda *_: self._enter(who, "head")))

    def _phase(self, name: str, begins: bool) -> None:
        observer = self.observer
        if not begins:
            if name == "forward":
                observer.memory.settle("temporary", "activations")
            observer.cause = "temporary"
            return
        observer.phase = name
        if name == "forward":
            observer.counts = self._times()
            self.passes += 1
        elif name == "optimizer":
            observer.counts = float(self.counts)
        self._at("start" if name == "forward" else "head" if name == "backward" else "")

    def _times(self) -> float:
        """How many passes the one that begins stands for; the first is that of statistics, over all batches."""
        times = self.times[self.passes - 1] if self.passes else sum(self.times) / len(self.times)
        return float(self.counts * times)

    def _at(self, part: str) -> None:
        memory, phase = self.observer.memory, self.observer.phase
        if phase == "backward":
            gradients(self.observer, self.run, self.hosted)
        self.observer.cause = "logits" if part.endswith("head") else "temporary"
        memory.at(f"{phase}:{part}" if part else phase)

    def _enter(self, who: str, part: str) -> None:
        if _in_backward():
            return
        if torch.is_grad_enabled():
            self.observer.memory.settle("temporary", "activations")
        self.observer.memory.begin()
        self._at(f"{who}{part}")

    def _leave(self, who: str, part: str, output: Any) -> None:
        if _in_backward():
            return
        memory = self.observer.memory
        state = output[0] if isinstance(output, tuple) else output
        if torch.is_grad_enabled():
            memory.settle("temporary", "activations")
        if isinstance(state, Tensor) and state.requires_grad:
            state.register_hook(lambda gradient: self._at(f"{who}{part}"))  # type: ignore[no-untyped-call]


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def label(observer: Observer, run: Run, hosted: bool = False) -> None:
    """Says what parameters, gradients and the state of optimizers are. hosted: whether what is trained lies in the
    host's memory, not the device's."""
    for role in run.roles.values():
        engine: Any = role.engine
        place = "host" if hosted else ""
        parameters: list[nn.Parameter] = list(engine.network.parameters())
        observer.memory.label(parameters, "parameters" if engine.optimizer is not None else "roles", place)
        if engine.optimizer is not None:
            states = engine.optimizer.state.values()
            kept = [one for state in states for one in state.values() if isinstance(one, Tensor)]
            observer.memory.label(kept, "optimizer", place)
        for cause, tensor in engine.kept() if hasattr(engine, "kept") else ():
            observer.memory.label([tensor], cause, place)
    gradients(observer, run, hosted)


def gradients(observer: Observer, run: Run, hosted: bool) -> None:
    """Says what gradients are, which come one by one."""
    for engine in run.trained_engines():
        made = [parameter.grad for parameter in engine.network.parameters() if parameter.grad is not None]  # type: ignore[attr-defined]
        observer.memory.label(made, "gradients", "host" if hosted else "")
