"""What a layout says without peers: who writes what, which worlds it takes, that an empty batch takes part."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from loomtune import world as worlds
from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Batch, Engine, Role, Sharding
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from loomtune_plugins.shardings.replicated import Replicated
from toys import sample

NAMES = ["single", "ddp", "fsdp"]
PARAMETER = nn.Parameter(torch.zeros(1))


def sharding(name: str, **settings: Any) -> Sharding:
    built: Sharding = installed().build("sharding", name, settings)
    return built


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [100, 1, 1, 1], [1, 1, 1, 100], [3, 0, 5, 7, 2, 9], [0, 0]])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_replicas_write_every_parameter_once(size: int, sizes: list[int]) -> None:
    replicas = [Replicated(world(rank, size), 25) for rank in range(size)]
    for index in range(len(sizes)):
        assert sum(one.answers_for(PARAMETER, index, sizes) for one in replicas) == 1


def test_replicas_share_the_writing_out_evenly() -> None:
    sizes = [10] * 16
    shares = [
        sum(Replicated(world(rank, 4), 25).answers_for(PARAMETER, i, sizes) for i in range(16)) for rank in range(4)
    ]
    assert shares == [4, 4, 4, 4]


def test_one_process_is_all_that_single_takes() -> None:
    sharding("single").check(1)
    with pytest.raises(UserError, match=r"set sharding=ddp or sharding=fsdp, or launcher\.procs=1"):
        sharding("single").check(2)


@pytest.mark.parametrize(
    ("size", "replicate", "nearest"), [(8, 3, "2"), (6, 4, "3"), (4, 5, "4"), (7, 2, "1"), (4, 0, "1")]
)
def test_a_world_that_cannot_be_divided_is_refused_with_the_nearest_that_can(
    size: int, replicate: int, nearest: str
) -> None:
    with pytest.raises(UserError, match=rf"set sharding\.replicate={nearest}, "):
        sharding("fsdp", replicate=replicate).check(size)


@pytest.mark.parametrize("replicate", [1, 2, 4, 8])
def test_a_world_that_can_be_divided_is_taken(replicate: int) -> None:
    sharding("fsdp", replicate=replicate).check(8)
    sharding("ddp").check(8)


@pytest.mark.parametrize(("reshard", "cure"), [(3, "reshard=2"), (8, "reshard=4"), (0, "reshard=2"), (1, "reshard=2")])
def test_a_group_to_keep_parameters_in_must_divide_the_ranks_that_share_them(reshard: int, cure: str) -> None:
    with pytest.raises(UserError, match=rf"set .*{cure}"):
        sharding("fsdp", reshard=reshard).check(8)
    with pytest.raises(UserError, match=r"set sharding\.reshard=true"):
        sharding("fsdp", reshard=2, replicate=4).check(8)


def test_parameters_that_are_cut_twice_are_not_regrouped() -> None:
    with pytest.raises(UserError, match=r"sharding\.reshard=2 cannot regroup parameters that sharding\.tensor=2 cuts"):
        sharding("fsdp", reshard=2, tensor=2).check(8)


@pytest.mark.parametrize("reshard", [True, False, 2, 4])
def test_reshard_takes_a_switch_or_a_group(reshard: Any) -> None:
    sharding("fsdp", reshard=reshard).check(8)


def test_fewer_than_no_blocks_ahead_are_refused() -> None:
    with pytest.raises(UserError, match=r"set sharding\.prefetch=0"):
        sharding("fsdp", prefetch=-1).check(2)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_every_rank_gets_rows_of_its_own(name: str) -> None:
    assert sharding(name).replicas(world(5, 8)) == (5, 8)


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A group of one, for device meshes."""
    yield worlds.join()
    worlds.leave()


def rows(*texts: str) -> Batch:
    return collate([sample(text) for text in texts], range(len(texts)), toy.ToyTokenizer.pad_id)


def norm(engine: Engine, *batches: Batch) -> float:
    for number, batch in enumerate(batches):
        with engine.accumulating(last=number == len(batches) - 1):
            engine.backward(-log_probs(Role("policy", engine), batch).sum() / 10)
    return engine.step(0.1, 0.0, lambda norm: False)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_rows_takes_part_with_gradients_of_zero(name: str, alone: World) -> None:
    engine = sharding(name).engine(toy.spec(), alone)
    assert norm(engine, rows()) == 0.0
    with_rows = norm(engine, rows("warp", "a weft"))
    assert with_rows > 0.0
    assert norm(engine, rows(), rows("warp", "a weft"), rows()) == pytest.approx(with_rows, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_the_norm_is_given_as_it_was_before_clipping(name: str, clip: float, alone: World) -> None:
    engine, free = (sharding(name).engine(toy.spec(), alone) for _ in range(2))
    before = {key: tensor.clone() for key, tensor in engine.stream_weights()}
    asked: list[float] = []
    for one, most in ((engine, clip), (free, 0.0)):
        one.backward(-log_probs(Role("policy", one), rows("warp", "weft")).sum())
        asked.append(one.step(0.1, most, lambda norm: True))
    assert asked[0] == asked[1] > 0.5
    factor = clip / asked[0] if 0.0 < clip < asked[0] else 1.0
    for (key, clipped), (_, whole) in zip(engine.stream_weights(), free.stream_weights(), strict=True):
        torch.testing.assert_close(clipped - before[key], factor * (whole - before[key]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_no_guard_vetoes_is_taken_whatever_its_norm(name: str, alone: World) -> None:
    engine = sharding(name).engine(toy.spec(), alone)
    engine.backward(-log_probs(Role("policy", engine), rows("warp")).sum() * torch.nan)
    assert math.isnan(engine.step(0.1, 1.0, lambda norm: True))
    assert all(tensor.isnan().all() for key, tensor in engine.stream_weights() if key == "head.weight")


@pytest.mark.parametrize("name", NAMES)
def test_frozen_networks_keep_no_optimizer_and_compute_alike(name: str, alone: World) -> None:
    trained, frozen = (sharding(name).engine(toy.spec(trained=kind), alone) for kind in (True, False))
    assert not frozen.trained() and frozen.state_bytes() == 0 and list(frozen.shards()) == []
    assert trained.state_bytes() == sum(tensor.nbytes for _, tensor in trained.stream_weights())
    values = [log_probs(Role("policy", one, trained=False), rows("warp")) for one in (trained, frozen)]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_tensors_that_are_wanted_are_streamed(name: str, alone: World) -> None:
    engine = sharding(name).engine(toy.spec(), alone)
    assert [key for key, _ in engine.stream_weights(lambda key: key == "head.weight")] == ["head.weight"]


class Dropping(toy.ToyModel):
    """Drops half of the hidden states."""

    def skeleton(self) -> nn.Module:
        made = toy.Decoder()
        made.drop = nn.Dropout(0.5)
        return made

    def hidden(self, module: Any, batch: Batch, attention: Any, extras: Any = None) -> torch.Tensor:
        dropped: torch.Tensor = module.drop(super().hidden(module, batch, attention, extras))
        return dropped


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_off_within_a_measurement_and_on_again_afterwards(name: str, alone: World) -> None:
    dropping, without = (sharding(name).engine(toy.spec(model), alone) for model in (Dropping(), toy.ToyModel()))
    role, batch = Role("policy", dropping), rows("warp", "weft")
    before = log_probs(role, batch)
    with dropping.evaluating():
        assert torch.equal(log_probs(role, batch), log_probs(Role("policy", without), batch))
    after = log_probs(role, batch)
    assert torch.equal(before, after) and not torch.allclose(before, log_probs(Role("policy", without), batch))


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_engine_holds_no_parameter_gradient_or_state(name: str, alone: World) -> None:
    engine: Any = sharding(name).engine(toy.spec(), alone)
    norm(engine, rows("warp", "a weft"))
    engine.backward(-log_probs(Role("policy", engine), rows("warp")).sum())
    held = [weakref.ref(parameter) for parameter in engine.trainable.values()]
    held += [weakref.ref(parameter.grad) for parameter in engine.trainable.values()]
    engine.close()
    gc.collect()
    assert engine is not None and [one() for one in held if one() is not None] == []
