"""What each rank of many holds of a 70B model, rehearsed without a byte of it: shares make up the whole."""

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
from loomtune.rehearsal import batches, rehearsed
from loomtune.run import Run
from loomtune.stepping import Stepper
from loomtune_plugins.planner.observing import Observer
from loomtune_plugins.planner.observing_memory import Memory
from loomtune_plugins.shardings.engine import TorchEngine
from runs.memory import anonymous

FP32 = 4
GROWTH = 1 << 30
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
    assert anonymous() - before < GROWTH


@contextmanager
def born(plan: Plan, rank: int, size: int) -> Iterator[tuple[Run, TorchEngine]]:
    """Within it this process is a rank of `size`, with the engine that a run would give it."""
    with rehearsed(plan, size, rank) as assembly, Observer(Memory()).looking():
        assembly.build_roles()
        engine = cast(TorchEngine, assembly.run.policy.engine)
        yield assembly.run, engine
        engine.close()


def parameter_bytes(engine: TorchEngine) -> int:
    return sum(engine.layout.local(parameter.detach()).nbytes for parameter in engine.trainable.values())


def moment_bytes(engine: TorchEngine) -> int:
    assert engine.optimizer is not None
    state: Any = engine.optimizer.state
    assert set(state) == set(engine.trainable.values()), "the step reached every parameter"
    return sum(engine.layout.local(of[name]).nbytes for of in state.values() for name in ("exp_avg", "exp_avg_sq"))


def check_step(plan: Plan, rank: int, sharers: int) -> None:
    """A rank's birth, forward, backward and optimizer step; `sharers` ranks have equal parts of everything."""
    expected = sum(FP32 * math.prod(shape) for shape in whole(plan))
    with lean(), born(plan, rank, 64) as (run, engine):
        assert parameter_bytes(engine) * sharers == expected
        assert engine.state_bytes() * sharers == 2 * expected, "what a run foretells"
        taken, stepper = batches(run)[:1], Stepper(run)
        stepper.accumulate(taken, stepper.totals(taken))
        stepper.update(run.optimizer.learning_rate, 1.0)
        assert moment_bytes(engine) * sharers == 2 * expected


@pytest.mark.parametrize(
    ("name", "rank", "sharers"),
    [("fsdp", 0, 64), ("fsdp", 31, 64), ("fsdp", 63, 64), ("hsdp", 0, 32), ("hsdp", 63, 32)],
)
def test_a_rank_of_64_takes_a_step_on_its_share_of_a_70b_model_cut_short(name: str, rank: int, sharers: int) -> None:
    plan = recipe(f"llama3_70b_full_{name}", "llama3_70b", "model.shape.num_hidden_layers=1")
    check_step(plan, rank, sharers)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 31, 63])
@pytest.mark.parametrize(("name", "sharers"), [("fsdp", 64), ("hsdp", 32)])
def test_a_rank_of_64_takes_a_step_on_its_share_of_a_70b_model(name: str, sharers: int, rank: int) -> None:
    plan = recipe(f"llama3_70b_full_{name}", "llama3_70b")
    assert sum(math.prod(shape) for shape in whole(plan)) == 70_553_706_496
    check_step(plan, rank, sharers)


@pytest.mark.parametrize(
    ("name", "size", "copies"),
    [
        ("fsdp", 6, 1),
        pytest.param("fsdp", 64, 1, marks=pytest.mark.slow),
        pytest.param("hsdp", 64, 2, marks=pytest.mark.slow),
    ],
)
def test_parts_that_do_not_divide_make_up_the_whole_over_all_ranks(name: str, size: int, copies: int) -> None:
    shape = ["model.shape.num_hidden_layers=1", "model.shape.vocab_size=1467"]
    plan = recipe(f"llama3_70b_full_{name}", "llama_1m", *shape)
    shapes = whole(plan)
    assert any(shape[0] % (size // copies) for shape in shapes), "a vocabulary of 1467 rows does not divide"
    parts = []
    for rank in range(size):
        with born(plan, rank, size) as (_, engine):
            parts.append(parameter_bytes(engine))
    assert len(set(parts)) > 1
    assert sum(parts) == copies * sum(FP32 * math.prod(shape) for shape in shapes)


def test_what_has_no_contents_answers_the_likeliest_and_what_is_known_stays_known() -> None:
    plan = recipe("llama3_70b_full_fsdp", "llama_1m", "model.shape.num_hidden_layers=1")
    with rehearsed(plan, 4, 3) as assembly, Observer(Memory()).looking():
        world = assembly.run.world
        assert (world.rank, world.size, dist.get_rank(), dist.get_world_size()) == (3, 4, 3, 4)
        unknown = torch.zeros(2, 3)
        assert float(unknown[0, 0]) == 1.0 and torch.equal(unknown, unknown + 1)
        known = torch.arange(4)
        assert (known * 2).tolist() == [0, 2, 4, 6]
        assert (known + unknown[0, 0]).shape == (4,)
        dist.all_reduce(unknown)
    assert not dist.is_initialized()
    assert float(torch.zeros(())) == 0.0


@pytest.mark.parametrize("rank", [0, 31])
def test_fewer_experts_than_ranks_are_shared_by_all(rank: int) -> None:
    plan = recipe("mixtral_8x7b_full_fsdp", "mixtral_8x7b", "model.shape.num_hidden_layers=1")
    expected = sum(FP32 * math.prod(shape) for shape in whole(plan))
    with lean(), born(plan, rank, 32) as (_, engine):
        assert 32 * parameter_bytes(engine) == pytest.approx(expected, rel=0.01), "the router is too small to share"
