"""One rank of a world that is not there: every tensor has its shape and no contents, every collective returns at once.

The engine is the very one of a run, so what it would hold can be counted on any machine: a 70B model on 64 ranks takes
half a gigabyte here. No number means anything, and no message reaches anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loomtune.batching import collate
from loomtune.catalogue import Catalogue
from loomtune.contracts import Batch, EngineSpec, Model, Role, Sample, Segment, Sharding, WeightSource
from loomtune.plan import Plan
from loomtune.world import World

ANSWER = 1
"""What is read where a tensor without contents is asked for a number; asked for a truth, it says yes."""


@contextmanager
def simulated(rank: int, size: int) -> Iterator[World]:
    """The world as one of `size` ranks sees it, on the CPU. Within it tensors have no contents.

    Ranges of integers, and all that is computed from plain tensors alone, stay real: device meshes and batches are.
    """
    import torch.testing._internal.distributed.fake_pg

    assert not dist.is_initialized(), "this process has joined a real world"
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=size)
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Answering():  # type: ignore[no-untyped-call]
            yield World(rank, size, rank, torch.device("cpu"), replica=rank, replicas=size)
    finally:
        # torch 2.13 takes the meshes of two ranks for one, and answers with the older.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        dist.destroy_process_group()


class _Answering(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what shapes alone do not tell, and leaves plain tensors alone. Entered after the mode that fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(tensors[0], FakeTensor):
            kind = tensors[0].dtype
            return float(ANSWER) if kind.is_floating_point else bool(ANSWER) if kind is torch.bool else ANSWER
        if func is torch.ops.aten.equal.default and any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return bool(ANSWER)
        is_range = func.overloadpacket is torch.ops.aten.arange
        if is_range or (tensors and all(type(tensor) is Tensor for tensor in tensors)):
            with torch._C._DisableTorchDispatch():
                return func(*args, **given)
        return func(*args, **given)


class _Hollow:
    """A model whose weights lie nowhere; all else is the model's own."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def weights(self, seed: int) -> WeightSource:
        return _Shapes(self._model)


class _Shapes(WeightSource):
    """Tensors without contents, of the shapes that the model's skeleton has."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def _known(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self._model.skeleton().state_dict().items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tied names too."""
        return self._known

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        """Of the shape that was asked for."""
        return torch.empty(self._known[name] if where is None else [part.stop - part.start for part in where])


def policy(plan: Plan, catalogue: Catalogue, world: World) -> Role:
    """The trained role of a plan on a rank of a simulated world, on the engine that a run would give it."""
    sharding: Sharding = plan.build(catalogue, "sharding")
    sharding.check(world.size)
    spec = EngineSpec(
        model=cast(Model, _Hollow(plan.build(catalogue, "model"))),
        adapter=plan.build(catalogue, "adapter"),
        kernel=next(iter(plan.build(catalogue, "kernel").values())),
        optimizer=plan.build(catalogue, "optimizer"),
        precision=plan.root.precision,
        seed=plan.root.seed,
    )
    return Role("policy", sharding.engine(spec, world))


def micro_batch(rows: int, length: int) -> Batch:
    """Rows of `length` tokens, each predicted but the first: the most that a micro-batch of that size can cost."""
    row = Sample((Segment(np.ones(length, np.int32), np.arange(length) > 0),))
    return collate([row] * rows, range(rows), pad_id=0)


def take_step(plan: Plan, catalogue: Catalogue, role: Role, batch: Batch) -> None:
    """Forward, backward and optimizer step of an objective that reads the policy alone."""
    objective, optimizer = plan.build(catalogue, "objective"), plan.build(catalogue, "optimizer")
    totals = objective.weights(batch)
    with role.engine.accumulating(last=True):
        sums = objective.loss({role.name: role}, batch, totals, {})
        losses = [value / totals[term] for term, value in sums.terms.items()]
        role.engine.backward(torch.stack(losses).sum())
    role.engine.step(optimizer.learning_rate, optimizer.clip, lambda norm: True)


def peak(role: Role, work: Callable[[], None]) -> dict[str, int]:
    """Bytes by kind (`Sharded Param`, `Activation`, ..., `Total`) where a rank held most while `work` ran.

    As torch's tracker counts, which knows FSDP2 alone. Take a step before: in the first, optimizers have no state yet.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    engine: Any = role.engine
    tracker = FSDPMemTracker(engine.network, engine.optimizer)
    # DTensor works out shapes on whole tensors: with a fake mode of their own they are not counted (torch 2.13).
    with patch("torch.distributed.tensor._sharding_prop.detect_fake_mode", lambda: None), tracker:
        work()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): count for kind, count in found.items()}
