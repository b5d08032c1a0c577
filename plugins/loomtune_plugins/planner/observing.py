"""Looks on while a run is rehearsed: memory by cause and moment, collectives, operations.

Every operation that autograd, the optimizer or a library comes down to passes here, above the fake tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from loomtune_plugins.planner import observing_collectives as wires
from loomtune_plugins.planner import observing_inside as inside
from loomtune_plugins.planner.observing_memory import Memory
from loomtune_plugins.planner.observing_values import computed, scalar
from loomtune_plugins.planner.observing_work import tensors, work
from loomtune_plugins.planner.trace import Collective, Work

aten = torch.ops.aten

ASKED = (aten._local_scalar_dense.default, aten.equal.default)
"""Operations whose result is no tensor."""

SHADOWS = "_propagate_tensor_meta_non_cached"
"""Where DTensor makes whole tensors, to see of what shape a result is."""


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what passes.

    phase: of `loomtune.phases`. cause: of what is allocated now. counts: how often the step does what is seen now; 0
    while nothing but memory is of interest.
    """

    def __init__(self, memory: Memory, kind: str = "") -> None:
        """kind: of `hardware`, for what operations do inside themselves."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self.kind = memory, kind
        memory.keep(inside.overhead(kind), "overhead")
        self.phase, self.cause, self.counts = "", "temporary", 0.0
        self.collectives: Counter[Collective] = Counter()
        self.work: Counter[Work] = Counter()
        self.again = 0
        self._silent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if any(kind is DTensor for kind in types):
            return NotImplemented  # until its parts come by
        if self._silent:
            return func(*args, **given)
        inputs = tensors([*args, *given.values()])
        if func in ASKED and any(isinstance(one, FakeTensor) for one in inputs):
            return scalar(args[0]) if func is ASKED[0] else True
        if func.namespace == "_c10d_functional" and func._overloadpacket.__name__ == "wait_tensor":
            return args[0]  # a fake one would be another tensor
        if func is aten.add.Tensor and not self.again and _adds_up():
            return args[0]
        result = computed(func, args, given, inputs)
        same = func.is_view and self.memory.knows(inputs[0])
        new = [] if same else [one for one in tensors([result]) if self.memory.see(one, self.cause)]
        if wires.is_collective(func):
            self._sent(func, args, result, new)
        elif not same:
            self.memory.within(inside.computed(func._overloadpacket.__name__, args, self.kind), self.cause)
            if self.counts and (done := work(func, args, given, result, self.phase, self.again > 0)):
                self.work[done] += self.counts  # type: ignore[assignment]
        return result

    def _sent(self, func: Any, args: Sequence[Any], result: Any, new: Sequence[Tensor]) -> None:
        one = wires.seen(func, args, result, self.phase)
        if one is None:
            return
        self.memory.within(inside.sent(one.operation, one.bytes, self.kind), "gathered")
        if self.counts:
            self.collectives[one] += self.counts  # type: ignore[assignment]
        if one.hidden and self.phase in ("forward", "backward"):
            for buffer in (*wires.buffers(args), *new):
                if self.memory.cause(buffer) in ("temporary", "activations", "logits"):
                    self.memory.label([buffer], "gathered")

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within it everything is seen."""
        with self, self._resizes(), self._shadows(), self._recomputations():
            yield

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within it nothing is."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    @contextmanager
    def _resizes(self) -> Iterator[None]:
        """FSDP frees and fills what it gathers by resizing storages, which is no operation."""
        before = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = before(storage, size)
            self.memory.resized(storage)
            return result

        with _set(torch.UntypedStorage, "resize_", resize):
            yield

    @contextmanager
    def _shadows(self) -> Iterator[None]:
        before = getattr(ShardingPropagator, SHADOWS)

        def propagate(*args: Any) -> Any:
            with self.silent():
                return before(*args)

        with _set(ShardingPropagator, SHADOWS, propagate):
            yield

    @contextmanager
    def _recomputations(self) -> Iterator[None]:
        """Counts how deep in recomputed passes the code is."""
        before: Any = checkpoint._recomputation_hook
        observer = self

        class Hook(before):  # type: ignore[misc]
            def __enter__(self) -> Any:
                observer.again += 1
                return super().__enter__()

            def __exit__(self, *args: Any) -> Any:
                observer.again -= 1
                return super().__exit__(*args)

        with _set(checkpoint, "_recomputation_hook", Hook):
            yield

    def told(self) -> tuple[list[Collective], list[Work]]:
        """What was counted."""
        sent = [replace(one, count=count) for one, count in self.collectives.items()]
        return sent, [replace(one, count=count) for one, count in self.work.items()]


def _adds_up() -> bool:
    """Whether autograd's engine adds up gradients that meet behind one of torch's own nodes.

    It does so in place where tensors are of torch's own class and nothing looks on (torch 2.13, `input_buffer.cpp`,
    `can_accumulate_inplace`). None of these nodes adds tensors in its own formula.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    node: Any = torch._C._current_autograd_node()
    return node is not None and not isinstance(node, BackwardCFunction)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name] if isinstance(owner, type) and name in vars(owner) else getattr(owner, name)
    inherited = isinstance(owner, type) and name not in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
