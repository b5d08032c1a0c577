"""The engine of a run on ranks that are not there: what each would hold of a 70B model, without a byte of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from loomtune import api
from loomtune.catalogue import installed
from loomtune.plan import Plan
from loomtune.testing.simulated import micro_batch, peak, policy, simulated, take_step
from loomtune_plugins.shardings.engine import TorchEngine
from runs.memory import anonymous

FP32 = 4
MEMORY = 1 << 30
"""Bytes by which this process may grow; one rank's state alone is 12 GiB at 80 layers on 64 ranks."""


def recipe(name: str, shape: str, *more: str) -> Plan:
    """The plan of a recipe for the named shape in place of the files that hold it."""
    plan = api.compose([f"recipe={name}"], processes=64)
    return replace(plan, settings={**plan.settings, "model": api.compose([f"model={shape}", *more]).settings["model"]})


def whole(plan: Plan) -> list[torch.Size]:
    """Shapes of all parameters."""
    with torch.device("meta"):
        return [parameter.shape for parameter in plan.build(installed(), "model").skeleton().parameters()]


@contextmanager
def lean() -> Iterator[None]:
    """Nothing inside may give storage to what a rank would hold."""
    before = anonymous()
    yield
    assert anonymous() - before < MEMORY


def born(plan: Plan, world: Any) -> TorchEngine:
    return cast(TorchEngine, policy(plan, installed(), world).engine)


def parameter_bytes(engine: TorchEngine) -> int:
    return sum(engine.layout.local(parameter.detach()).nbytes for parameter in engine.trainable.values())


def moment_bytes(engine: TorchEngine) -> int:
    assert engine.optimizer is not None
    state = engine.optimizer.state
    assert set(state) == set(engine.trainable.values()), "the step reached every parameter"
    return sum(engine.layout.local(of[name]).nbytes for of in state.values() for name in ("exp_avg", "exp_avg_sq"))


def check_step(plan: Plan, rank: int, sharers: int) -> None:
    """A rank's birth, forward, backward and optimizer step; `sharers` ranks have equal parts of everything."""
    expected = sum(FP32 * math.prod(shape) for shape in whole(plan))
    with lean(), simulated(rank, 64) as world:
        role = policy(plan, installed(), world)
        engine = cast(TorchEngine, role.engine)
        assert parameter_bytes(engine) * sharers == expected
        take_step(plan, installed(), role, micro_batch(rows=1, length=plan.root.max_length))
        assert moment_bytes(engine) * sharers == 2 * expected
        assert engine.state_bytes() * sharers == 2 * expected, "what a run foretells"
        engine.close()


@pytest.mark.parametrize(
    ("name", "rank", "sharers"), [("fsdp", 0, 64), ("fsdp", 31, 64), ("fsdp", 63, 64), ("hsdp", 0, 8), ("hsdp", 63, 8)]
)
def test_a_rank_of_64_takes_a_step_on_its_share_of_a_70b_model_cut_short(name: str, rank: int, sharers: int) -> None:
    plan = recipe(f"llama3_70b_full_{name}", "llama3_70b", "model.shape.num_hidden_layers=1")
    check_step(plan, rank, sharers)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 31, 63])
@pytest.mark.parametrize(("name", "sharers"), [("fsdp", 64), ("hsdp", 8)])
def test_a_rank_of_64_takes_a_step_on_its_share_of_a_70b_model(name: str, sharers: int, rank: int) -> None:
    plan = recipe(f"llama3_70b_full_{name}", "llama3_70b")
    assert sum(math.prod(shape) for shape in whole(plan)) == 70_553_706_496
    check_step(plan, rank, sharers)


@pytest.mark.parametrize(
    ("name", "size", "copies"),
    [
        ("fsdp", 6, 1),
        pytest.param("fsdp", 64, 1, marks=pytest.mark.slow),
        pytest.param("hsdp", 64, 8, marks=pytest.mark.slow),
    ],
)
def test_parts_that_do_not_divide_make_up_the_whole_over_all_ranks(name: str, size: int, copies: int) -> None:
    shape = ["model.shape.num_hidden_layers=1", "model.shape.vocab_size=1467"]
    plan = recipe(f"llama3_70b_full_{name}", "llama_1m", *shape)
    shapes = whole(plan)
    assert any(shape[0] % (size // copies) for shape in shapes), "a vocabulary of 1467 rows does not divide"
    parts = []
    for rank in range(size):
        with simulated(rank, size) as world:
            parts.append(parameter_bytes(born(plan, world)))
    assert len(set(parts)) > 1
    assert sum(parts) == copies * sum(FP32 * math.prod(shape) for shape in shapes)


def test_the_peak_of_a_rank_is_counted_by_kind_and_without_whole_tensors_that_only_carry_shapes() -> None:
    plan = recipe("llama3_70b_full_fsdp", "llama3_70b", "model.shape.num_hidden_layers=1")
    share = sum(FP32 * math.prod(shape) for shape in whole(plan)) // 64
    with lean(), simulated(33, 64) as world:
        role, batch = policy(plan, installed(), world), micro_batch(rows=1, length=512)
        take_step(plan, installed(), role, batch)
        found = peak(role, lambda: take_step(plan, installed(), role, batch))
    assert found["Sharded Param"] == share
    assert 2 * share <= found["OptState"] < 2 * share + 4096, "a count of steps for each parameter comes on top"
    total = found.pop("Total")
    assert total == sum(found.values())
    # Beside its state: what is whole for a while of the embedding, the head and a block, but no parameter of DTensor's.
    assert 4 * share < total < 20 * 2**30


def test_what_has_no_contents_answers_yes_and_one_and_what_is_known_stays_known() -> None:
    with simulated(3, 4) as world:
        assert (world.rank, world.size, dist.get_rank(), dist.get_world_size()) == (3, 4, 3, 4)
        unknown = torch.zeros(2, 3)
        assert float(unknown[0, 0]) == 1.0 and bool(unknown.bool().all()) and torch.equal(unknown, unknown + 1)
        known = torch.arange(4)
        assert (known * 2).tolist() == [0, 2, 4, 6]
        assert (known + unknown[0, 0]).shape == (4,)
        assert micro_batch(rows=2, length=3).positions.tolist() == [[0, 1, 2], [0, 1, 2]]
        dist.all_reduce(unknown)
    assert not dist.is_initialized()
    assert float(torch.zeros(())) == 0.0
