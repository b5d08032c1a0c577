"""ZeRO in one process: what a stage keeps, sums, refuses and forgets."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping
from ctypes.util import find_library
from typing import Any

import pytest
import torch
from torch import Tensor

from loomtune import world as worlds
from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Batch, Engine, Role, StateKind
from loomtune.errors import UserError
from loomtune.testing import check_sharding, toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from loomtune_plugins.shardings import deepspeed_state, zero_engine
from toys import sample

WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "persist": 0},
    "stage 2, offloaded": {"stage": 2, "offload": "optimizer"},
    "stage 3, offloaded": {"stage": 3, "persist": 0, "offload": "all"},
}
SELDOM = ("stage 2", "stage 2, offloaded", "stage 3, offloaded")
ways = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way in SELDOM else way for way in WAYS]
)


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A group of one."""
    yield worlds.join()
    worlds.leave()


class Adam(toy.ToyOptimizer):
    """AdamW, whose state is a tensor like the parameter and a count."""

    def build(self, groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": list(group.parameters)} for group in groups], lr=0.1, fused=True)

    def state(self) -> Mapping[str, StateKind]:
        return {"exp_avg": StateKind.LIKE, "exp_avg_sq": StateKind.LIKE, "step": StateKind.SCALAR}


def spec(precision: str = "fp32", **more: Any) -> Any:
    made = toy.spec(**more)
    chosen = {name: getattr(made, name) for name in made.__slots__} | {"precision": precision}
    return type(made)(**(chosen | ({"optimizer": Adam()} if made.optimizer else {})))


def engine(way: str, world: World, precision: str = "fp32", **more: Any) -> Engine:
    built: Engine = installed().build("sharding", "zero", WAYS[way]).engine(spec(precision, **more), world)
    return built


def rows(*texts: str) -> Batch:
    return collate([sample(text) for text in texts], range(len(texts)), toy.ToyTokenizer.pad_id)


def loss(of: Engine, *texts: str) -> Tensor:
    return -log_probs(Role("policy", of), rows(*texts)).sum() / 10


def step(of: Engine, *batches: tuple[str, ...], rate: float = 0.01, proceed: bool = True) -> float:
    for number, texts in enumerate(batches):
        with of.accumulating(last=number == len(batches) - 1):
            of.backward(loss(of, *texts))
    return of.step(rate, 1.0, lambda norm: proceed)


def kept(of: Engine) -> dict[tuple[Any, ...], Tensor]:
    """Everything that a checkpoint would hold, and the weights that compute."""
    state = {
        (shard.name, shard.offset, key): tensor.clone()
        for shard in of.shards()
        for key, tensor in shard.tensors.items()
    }
    return state | {(name,): tensor.clone() for name, tensor in of.stream_weights()}


def same(one: dict[tuple[Any, ...], Tensor], other: dict[tuple[Any, ...], Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


WARP, WEFT, BOTH = ("warp",), ("weft", "heddle"), ("warp", "weft", "heddle")


@ways
def test_the_contract_is_kept(way: str, alone: World) -> None:
    check_sharding(installed().build("sharding", "zero", WAYS[way]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@ways
def test_a_veto_leaves_everything_to_the_bit(way: str, precision: str, alone: World) -> None:
    vetoed, other = (engine(way, alone, precision) for _ in range(2))
    for one in (vetoed, other):
        step(one, WARP)
    before = kept(vetoed)
    step(vetoed, WEFT, BOTH, proceed=False)
    assert same(kept(vetoed), before)
    for one in (vetoed, other):
        step(one, WEFT, WARP)
    assert same(kept(vetoed), kept(other))


@ways
def test_a_gradient_that_is_not_finite_leaves_nothing_behind(way: str, alone: World) -> None:
    poisoned, other = (engine(way, alone) for _ in range(2))
    poisoned.backward(loss(poisoned, *WARP) * torch.nan)
    assert math.isnan(poisoned.step(0.01, 1.0, lambda norm: False))
    assert step(poisoned, WEFT, WARP) == step(other, WEFT, WARP)
    assert same(kept(poisoned), kept(other))


@ways
def test_forwards_before_a_backward_and_backwards_after_them_all_add_up(way: str, alone: World) -> None:
    norms = []
    for order in ("one by one", "one sum", "all forwards first"):
        one = engine(way, alone)
        losses = [loss(one, *WARP), loss(one, *WEFT)] if order != "one by one" else []
        if order == "one by one":
            for texts in (WARP, WEFT):
                with one.accumulating(last=texts is WEFT):
                    one.backward(loss(one, *texts))
        elif order == "one sum":
            one.backward(losses[0] + losses[1])
        else:
            for number, part in enumerate(losses):
                with one.accumulating(last=number == 1):
                    one.backward(part)
        norms.append(one.step(0.01, 0.0, lambda norm: False))
        one.close()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)


@ways
def test_a_step_that_no_guard_vetoes_is_taken_whatever_its_norm(way: str, alone: World) -> None:
    one = engine(way, alone)
    one.backward(loss(one, *WARP) * torch.nan)
    assert math.isnan(one.step(0.01, 1.0, lambda norm: True))
    assert all(tensor.isnan().all() for name, tensor in one.stream_weights() if name == "head.weight")


def with_head(of: Engine, *texts: str) -> Tensor:
    """A loss that uses the scalar head as well."""
    values: Tensor = Role("value", of, head="value").read(rows(*texts), lambda view: view.heads["value"](view.states))
    return loss(of, *texts) + values.square().sum()


@ways
def test_a_head_that_one_micro_batch_leaves_out_gets_nothing_of_the_step_before(way: str, alone: World) -> None:
    norms = []
    for order in ((loss, with_head), (with_head, loss)):
        one = engine(way, alone, heads=("lm", "value"))
        for parts in ((with_head, with_head), order):
            for number, part in enumerate(parts):
                with one.accumulating(last=number == 1):
                    one.backward(part(one, *WARP))
            norms.append(one.step(0.01, 0.0, lambda norm: True))
        one.close()
    assert norms[0] == norms[2] and norms[1] == pytest.approx(norms[3], rel=1e-6)


@ways
def test_a_measurement_between_forward_and_backward_changes_nothing(way: str, alone: World) -> None:
    measured, other = (engine(way, alone) for _ in range(2))
    for number in range(3):  # DeepSpeed gathers ahead only once it has seen the same passes twice
        for one in (measured, other):
            with one.accumulating(last=True):
                value = loss(one, *BOTH)
                if one is measured:
                    with one.evaluating():
                        loss(one, *WARP)
                one.backward(value)
            one.step(0.01, 1.0, lambda norm: True)
        assert same(kept(measured), kept(other)), number


@ways
def test_a_look_at_the_weights_changes_nothing(way: str, alone: World) -> None:
    looked_at, other = (engine(way, alone) for _ in range(2))
    for one in (looked_at, other):
        step(one, WARP)
    with looked_at.accumulating(last=False):
        looked_at.backward(loss(looked_at, *WARP))
    with looked_at.evaluating():
        loss(looked_at, *BOTH)
    with looked_at.gathered() as module:
        assert sum(parameter.numel() for parameter in module.parameters()) == sum(
            tensor.numel() for _, tensor in looked_at.stream_weights()
        )
    with looked_at.accumulating(last=True):
        looked_at.backward(loss(looked_at, *WEFT))
    looked_at.step(0.01, 1.0, lambda norm: True)
    step(other, WARP, WEFT)
    assert same(kept(looked_at), kept(other))


@ways
def test_a_closed_engine_is_gone_and_the_next_one_works(way: str, alone: World) -> None:
    first = engine(way, alone)
    step(first, WARP)
    network = weakref.ref(first.network)  # type: ignore[attr-defined]
    first.close()
    del first
    gc.collect()
    assert network() is None
    assert step(engine(way, alone), WARP) > 0.0


@ways
def test_a_frozen_engine_computes_beside_a_trained_one(way: str, alone: World) -> None:
    trained, frozen = engine(way, alone), engine(way, alone, trained=False)
    assert not frozen.trained() and frozen.state_bytes() == 0 and list(frozen.shards()) == []
    with torch.no_grad():
        assert torch.equal(loss(trained, *BOTH), loss(frozen, *BOTH))
    before = {name: tensor.clone() for name, tensor in frozen.stream_weights()}
    step(trained, WARP)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.stream_weights())
    with torch.no_grad():
        assert not torch.equal(loss(trained, *BOTH), loss(frozen, *BOTH))
    frozen.close()
    assert step(trained, WEFT) > 0.0


@pytest.mark.parametrize("way", ["stage 1", "stage 2", "stage 3"])
def test_masters_keep_what_bf16_cannot(way: str, alone: World) -> None:
    one, exact = engine(way, alone, "bf16"), toy.Drawn(0)
    for name, tensor in one.stream_weights():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact.read(name))
    step(one, WARP, rate=1e-6)
    changed = {shard.name: shard.tensors["weight"] for shard in one.shards() if shard.name == "head.weight"}
    assert not torch.equal(changed["head.weight"].flatten(), exact.read("head.weight").flatten())


def reader(of: Engine) -> Any:
    """What `load` reads from: the state of an engine in one process."""
    kept = {shard.name: {key: tensor.clone() for key, tensor in shard.tensors.items()} for shard in of.shards()}

    def read(name: str, tensor: str, region: tuple[slice, ...] | None) -> Tensor:
        return kept[name][tensor] if region is None else kept[name][tensor][region]

    return read


@ways
def test_state_of_before_the_first_step_is_loaded_over_that_of_a_later_one(way: str, alone: World) -> None:
    fresh, later = engine(way, alone), engine(way, alone)
    step(later, WARP)
    later.load(reader(fresh), optimizer=True)
    assert same(kept(later), kept(fresh))
    for one in (fresh, later):
        step(one, WEFT)
    assert same(kept(later), kept(fresh))


@ways
def test_a_count_of_steps_that_differs_within_a_group_is_refused(way: str, alone: World) -> None:
    one = engine(way, alone)
    step(one, WARP)
    read = reader(one)

    def differing(name: str, tensor: str, region: tuple[slice, ...] | None) -> Tensor:
        values: Tensor = read(name, tensor, region)
        return values + 1 if (name, tensor) == ("head.weight", "step") else values

    with pytest.raises(UserError, match="the step of the optimizer differs"):
        one.load(differing, optimizer=True)


def test_groups_are_cut_into_smaller_ones_where_they_are_large(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed does of itself above a thousand million numbers."""
    whole = engine("stage 3", alone)
    told = zero_engine.configuration

    def small(*settings: Any) -> dict[str, Any]:
        made = told(*settings)
        return made | {"zero_optimization": made["zero_optimization"] | {"sub_group_size": 1000}}

    monkeypatch.setattr(zero_engine, "configuration", small)
    cut = engine("stage 3", alone)
    for one in (whole, cut):
        step(one, WARP)
    cut.load(reader(whole), optimizer=True)
    for one in (whole, cut):
        step(one, WEFT)
    assert len(cut.partitions.groups) > len(whole.partitions.groups)  # type: ignore[attr-defined]
    assert same(kept(cut), kept(whole))


@ways
def test_reductions_in_many_small_buckets_are_the_same(way: str, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(way, alone)
    told = zero_engine.configuration

    def small(*settings: Any) -> dict[str, Any]:
        made = told(*settings)
        return made | {"zero_optimization": made["zero_optimization"] | {"reduce_bucket_size": 600}}

    monkeypatch.setattr(zero_engine, "configuration", small)
    other = engine(way, alone)
    assert step(one, WARP, WEFT) == step(other, WARP, WEFT)
    assert same(kept(one), kept(other))


def test_the_process_group_there_is_is_used_and_nothing_is_built(alone: World, capfd: pytest.CaptureFixture) -> None:
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    one = engine("stage 3", alone)
    step(one, WARP, WEFT)
    assert groups._get_data_parallel_group() is dist.group.WORLD
    assert comm.cdb.shm_comm_op is None
    assert capfd.readouterr() == ("", "")


def test_another_layout_than_was_tried_is_said_at_the_start(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_state.Stages12, "FLATS", "flat_masters")
    with pytest.raises(UserError, match=r"it has no flat_masters(?s:.*)pip install deepspeed==0\.19\.8"):
        engine("stage 2", alone)


@pytest.mark.slow
def test_state_on_a_disk_is_the_same_state(
    alone: World, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Builds DeepSpeed's async_io where it was not built before, which takes minutes."""
    if find_library("aio") is None:
        pytest.skip("libaio is absent")
    monkeypatch.setattr(toy, "WIDTH", 512)  # smaller tensors are not worth a file to DeepSpeed
    disk = {**WAYS["stage 3, offloaded"], "nvme": str(tmp_path_factory.mktemp("disk"))}
    monkeypatch.setitem(WAYS, "on disk", disk)
    memory, swapped = engine("stage 3, offloaded", alone), engine("on disk", alone)
    for one in (memory, swapped):
        one.backward(loss(one, *WARP))
        one.step(0.01, 0.0, lambda norm: True)
    assert same(kept(swapped), kept(memory))
    assert step(swapped, WEFT) == pytest.approx(step(memory, WEFT), rel=1e-6)
