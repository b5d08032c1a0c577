"""Checks of sharding strategies, in one process: what can be seen without peers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, Engine, Sharding
from loomtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.world import World

TEXTS = ("a loom", "warp and weft", "heddle, reed")


def check_sharding(sharding: Sharding) -> None:
    """Checks an engine of one process: sums, the gradient's norm, a refused step, evaluation, and state out and in.

    Agreement over processes is for tests that start some; see `docs/plugins.md`.
    """
    from loomtune.testing import toy

    sharding.check(1)
    with _joined() as world:
        assert sharding.replicas(world) == (0, 1), "one process is the only replica"
        batches = [_batch([text]) for text in TEXTS]
        engine = sharding.engine(toy.spec(), world)
        _check_gradients(engine, batches)
        _check_evaluating(engine, batches[0])
        _check_weights(engine)
        _check_wearing(engine)
        _check_state(engine, sharding.engine(toy.spec(), world), batches)
        engine.close()


@contextmanager
def _joined() -> Iterator[World]:
    """A group of one, or the process group that there is already."""
    import torch.distributed as dist

    from loomtune import world as worlds
    from loomtune.testing import toy

    if dist.is_initialized():
        yield toy.world()
        return
    try:
        yield worlds.join()
    finally:
        worlds.leave()


def _batch(texts: list[str]) -> Batch:
    import numpy as np

    from loomtune.batching import collate
    from loomtune.contracts import Sample, Segment
    from loomtune.testing import toy

    samples = []
    for text in texts:
        tokens = np.array([toy.ToyTokenizer.bos_id, *toy.ToyTokenizer().encode(text)], np.int32)
        samples.append(Sample((Segment(tokens, np.arange(len(tokens)) > 0),)))
    return collate(samples, range(len(samples)), toy.ToyTokenizer.pad_id)


def _loss(engine: Engine, batch: Batch) -> Tensor:
    from loomtune.contracts import Role
    from loomtune.toolkit import log_probs

    return -log_probs(Role("policy", engine), batch.to(_device(engine))).sum() / 100


def _device(engine: Engine) -> Any:
    return next(tensor.device for _, tensor in engine.stream_weights())


def _step(engine: Engine, batches: list[Batch], *, proceed: bool = True) -> float:
    for number, batch in enumerate(batches):
        with engine.accumulating(last=number == len(batches) - 1):
            engine.backward(_loss(engine, batch))
    return engine.step(0.1, 0.0, lambda norm: proceed)


def _weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in engine.stream_weights()}


def _check_gradients(engine: Engine, batches: list[Batch]) -> None:
    import torch

    before = _weights(engine)
    apart = _step(engine, batches, proceed=False)
    together = _step(engine, [_batch(list(TEXTS))], proceed=False)
    assert math.isclose(apart, together, rel_tol=1e-5), f"gradient norm {apart} in micro-batches, {together} whole"
    after = _weights(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "a refused step changed weights"
    norm = _step(engine, batches)
    assert math.isclose(norm, apart, rel_tol=1e-5), f"a refused step left gradients behind: {norm}, first {apart}"
    moved = _weights(engine)
    assert any(not torch.equal(moved[name], tensor) for name, tensor in before.items()), "a step changed nothing"


def _check_evaluating(engine: Engine, batch: Batch) -> None:
    with engine.evaluating():
        assert not _loss(engine, batch).requires_grad, "gradients are kept within evaluating()"
    assert _loss(engine, batch).requires_grad, "no gradients are kept after evaluating()"


def _check_weights(engine: Engine) -> None:
    from loomtune.testing import toy

    expected = dict(toy.Drawn(0).shapes())
    found = {name: tuple(tensor.shape) for name, tensor in engine.stream_weights()}
    assert found == expected, f"streamed {sorted(found.items())}, the model has {sorted(expected.items())}"
    assert dict(engine.trained()) == expected, "everything is trained, under the model's own names"
    with engine.gathered() as module:
        assert {name for name, _ in module.named_parameters()} == set(expected), "gathered() gives the plain model"


def _check_wearing(engine: Engine) -> None:
    """Other values take the place of those that are trained, and give it back, whatever happens meanwhile.

    A layout that cannot do it says so.
    """
    import torch

    before, worn = _weights(engine), next(iter(engine.trained()))

    def other(name: str, tensor: str, region: tuple[slice, ...] | None) -> Tensor:
        if name != worn:
            raise KeyError(name)
        return (before[name].cpu() if region is None else before[name].cpu()[region]) + 1

    with suppress(InterruptedError, UserError), engine.wearing(other):
        now = _weights(engine)
        assert torch.equal(now[worn], before[worn] + 1), "wearing() puts what is read in the place of a parameter"
        same = all(torch.equal(now[name], tensor) for name, tensor in before.items() if name != worn)
        assert same, "what raises a KeyError stays as it is within wearing()"
        raise InterruptedError
    now = _weights(engine)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), "afterwards all is what it was"


def _check_state(engine: Engine, fresh: Engine, batches: list[Batch]) -> None:
    """What one engine saves, another goes on from, with the same next step."""
    saved = {shard.name: shard for shard in engine.shards()}
    shapes = {name: shard.shape for name, shard in saved.items()}
    assert shapes == dict(engine.trained()), f"one process saves everything, not only {sorted(shapes)}"
    kept = {name: {key: t.detach().clone() for key, t in shard.tensors.items()} for name, shard in saved.items()}

    def read(name: str, tensor: str, region: tuple[slice, ...] | None) -> Tensor:
        whole = kept[name][tensor].cpu()
        return whole if region is None else whole[region]

    fresh.load(read, optimizer=True)
    _step(engine, batches)
    _step(fresh, batches)
    for name, tensor in _weights(engine).items():
        difference = float((tensor - _weights(fresh)[name]).abs().max())
        assert difference < 1e-6, f"{name} differs by {difference} in the step after a resume"
    fresh.close()
