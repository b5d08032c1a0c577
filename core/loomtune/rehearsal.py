"""A run that is only looked at: every part of it, in a world of any size, with tensors that have no storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from loomtune.assembly import Assembly, assemble
from loomtune.batching import micro_limit, step_batches
from loomtune.catalogue import installed
from loomtune.contracts import Batch, Model, Sample, Tokenizer, WeightSource
from loomtune.contracts.saved import HEADS
from loomtune.errors import UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.run import Run
from loomtune.toolkit.log_probs import PLAIN
from loomtune.toolkit.placing import on_host
from loomtune.world import World

CPUS = ("", "cpu")
WORD, END = "w", "</s>"


class _Alone(World):
    """One of many ranks, whose peers all have what it has, and whom nobody hears."""

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [number * self.replicas for number in numbers]

    def total(self, numbers: Sequence[float]) -> list[float]:
        return [number * self.size for number in numbers]

    def gather(self, thing: Any) -> list[Any]:
        return [thing] * self.size

    def gather_tensor(self, values: Tensor) -> Tensor:
        return torch.cat([values] * self.replicas)


class _Words(Tokenizer):
    """A token for each word, so that rows of any length can be made up."""

    pad_id, eos_id, bos_id, fingerprint, adds_bos = 0, 1, None, "", False

    def encode(self, text: str) -> list[int]:
        return [self.eos_id if word == END else 2 for word in text.split()]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return " ".join(END if token == self.eos_id else WORD for token in tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        raise UserError.of("words have no chat template", "rehearse rows of plain text")

    def save(self, folder: Path) -> None:
        raise UserError.of("words are no tokenizer that anybody reads", "save the model's own")


class _Weightless(WeightSource):
    """Weights of the right shapes and types that hold nothing.

    module: a skeleton, on the meta device. hosted: whether they are read into memory that is not the device's.
    """

    def __init__(self, module: Any, hosted: bool) -> None:
        self._tensors, self._hosted = module.state_dict(), hosted

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        width = next(tensor.shape[-1] for tensor in self._tensors.values() if tensor.ndim == 2)
        return {
            f"{HEADS}value.weight": (1, width),
            **{name: tuple(tensor.shape) for name, tensor in self._tensors.items()},
        }

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        whole = torch.empty(self.shapes()[name], device="meta", dtype=self.dtype(name))
        with on_host(self._hosted):
            return torch.empty_like(whole if where is None else whole[where], device="cpu")

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype if name in self._tensors else torch.float32


def weightless(model: Model, blocks: int, hosted: bool) -> Model:
    """A model that is only looked at. blocks: of which so many are taken; 0: all."""
    other: Any = copy(model.of_depth(blocks) if blocks else model)

    def weights(seed: int) -> WeightSource:
        with torch.device("meta"):
            return _Weightless(other.skeleton(), hosted)

    other.weights, other.tokenizer, other.restore_buffers = weights, _Words, lambda module: None
    return other  # type: ignore[no-any-return]


@contextmanager
def rehearsed(plan: Plan, processes: int, rank: int = 0, blocks: int = 0) -> Iterator[Assembly]:
    """Within it this process is one rank of as many; the run's parts, whose roles are still to be built.

    Tensors are made without storage, and collectives reach nobody. blocks: of each model's; 0: all.
    """
    assert not dist.is_initialized(), "a process that is part of a world rehearses no other"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        world = _Alone(rank, processes, 0, torch.device("cpu"), replica=rank, replicas=processes)
        kind = plan.root.hardware.kind
        with FakeTensorMode(allow_non_fake_inputs=True), _swapped(), _real_meshes(), _plain(kind):
            lease = Lease(Path(), "rehearsal")
            made = lambda model: weightless(model, min(blocks, model.depth()[0]), kind not in CPUS)  # noqa: E731
            yield assemble(plan, Path(), installed(), world, lease, observed=False, rehearsed=made)
    finally:
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call] # torch 2.13 takes the meshes of two ranks for one
        dist.destroy_process_group()


@contextmanager
def _plain(kind: str) -> Iterator[None]:
    """Within it tensors take the ways that only those of CPUs take, where the run is for such."""
    if kind in CPUS:
        PLAIN.add(FakeTensor)
    try:
        yield
    finally:
        PLAIN.discard(FakeTensor)


def _swapped() -> AbstractContextManager[Any]:
    """Within it tensors swap what they are although others know of them weakly, as the fake mode does of every one."""
    return mock.patch.object(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda tensor: []))


def _real_meshes() -> AbstractContextManager[Any]:
    """Within it device meshes are made of numbers, which they look at."""

    def real(method: Any) -> Any:
        @wraps(method)
        def call(*args: Any, **given: Any) -> Any:
            with unset_fake_temporarily():
                return method(*args, **given)

        return call

    kept = {name: vars(DeviceMesh)[name] for name in ("__init__", "__getitem__", "_flatten", "mesh")}
    made: dict[str, Any] = {
        name: property(real(one.fget)) if isinstance(one, property) else real(one) for name, one in kept.items()
    }
    return mock.patch.multiple(DeviceMesh, **made)  # type: ignore[no-any-return]


def batches(run: Run, rows: Sequence[Sequence[int]] = ()) -> list[Batch]:
    """This rank's micro-batches of a step. rows: words of the prompt and of the answers; none: each row is full."""
    objective, longest = run.objective, run.max_length
    chosen = run.plan.chosen("objective")
    if objective.online():  # an epoch's prompts are dealt out to its steps
        rows = rows or [(max(1, longest - int(chosen.get("max_new_tokens", 0))),)]
    made = [_sample(run, row) for row in rows or [(1, longest - 1)]]
    size = -(-run.settings.batch.size // int(chosen.get("minibatches", 1)))
    samples = [sample for i in range(size) for sample in made[i % len(made)]]
    samples = samples if objective.online() else list(objective.together(samples, longest))
    with unset_fake_temporarily():  # what they hold is known, and looked at
        return step_batches(run, samples, range(len(samples)), micro_limit(run))


def _sample(run: Run, row: Sequence[int]) -> list[Sample]:
    """What the objective makes of a row of so many words, with the columns of roles that are not there."""
    objective, longest = run.objective, run.max_length
    made = objective.sample(_row(*row), run.tokenizer, longest)
    samples = list(objective.imagined(made, longest))
    for name, record in objective.records().items():
        if record.role not in run.roles:
            shape = (record.width,) if record.width else ()
            samples = [one.with_column(name, np.zeros((one.targets, *shape), np.float32)) for one in samples]
    return samples


def _row(prompt: int, *answers: int) -> dict[str, Any]:
    """A row that any objective finds its columns in."""
    said = [" ".join([WORD] * max(0, count - 1) + [END]) for count in answers or (1,)]
    asked = " ".join([WORD] * prompt)
    pair = {"chosen": said[0], "rejected": said[-1]}
    return {"prompt": asked + " ", "completion": said[0], "text": f"{asked} {said[0]}", "label": True, **pair}
