"""A rehearsal against arithmetic by hand: nothing is read, nothing is sent, and everything is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _get_current_dispatch_mode

from loomtune.errors import UserError
from loomtune_plugins.planner.rehearse import traced
from loomtune_plugins.planner.trace import Trace
from rehearsing import BLOCKS, INNER, VOCABULARY, WIDTH, planned

BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
"""Parameters of a block: four projections of attention, three of the feed-forward layer, two norms."""

PARAMETERS = BLOCKS * BLOCK + 2 * VOCABULARY * WIDTH + WIDTH


def seen(*words: str, processes: int = 1, rank: int = 0, micro: int = 2, rows: Sequence[Sequence[int]] = ()) -> Trace:
    return traced(planned(f"batch.micro={micro}", *words), processes, rank, rows=rows)


@pytest.fixture(scope="module")
def alone() -> Trace:
    return seen("sharding=single")


@pytest.fixture(scope="module")
def sharded() -> Trace:
    return seen("sharding=fsdp", processes=4)


def test_parameters_and_the_optimizers_state_are_what_arithmetic_says(alone: Trace) -> None:
    assert alone.parameters == (PARAMETERS, PARAMETERS, PARAMETERS)
    assert alone.kept["parameters"] == pytest.approx(4 * PARAMETERS, rel=0.005)  # and rotary tables
    steps = 4 * (9 * BLOCKS + 3)
    assert alone.kept["optimizer"] == 8 * PARAMETERS + steps
    assert alone.moments["optimizer"].causes["gradients"] == 4 * PARAMETERS
    assert "gradients" not in alone.kept


def test_a_rank_of_many_keeps_its_part(sharded: Trace) -> None:
    assert sharded.kept["parameters"] == pytest.approx(4 * PARAMETERS / 4, rel=0.01)
    assert sharded.kept["optimizer"] == pytest.approx(8 * PARAMETERS / 4, rel=0.01)


def test_causes_add_up_to_the_peak(alone: Trace, sharded: Trace) -> None:
    for trace in (alone, sharded):
        assert all(peak.bytes == sum(peak.causes.values()) for peak in trace.moments.values())


def test_fsdp_gathers_every_block_twice_and_reduces_it_once(sharded: Trace) -> None:
    micro = sharded.micro
    sizes = {one.bytes for one in sharded.collectives if one.operation in ("all_gather", "reduce_scatter")}
    assert sizes == {4 * BLOCK, 4 * (2 * VOCABULARY * WIDTH + WIDTH)}
    counts = {
        (one.operation, one.phase): one.count
        for one in sharded.collectives
        if one.bytes == 4 * BLOCK and one.operation != "all_reduce"
    }
    assert counts == {
        ("all_gather", "forward"): BLOCKS * micro,
        ("all_gather", "backward"): BLOCKS * micro,
        ("reduce_scatter", "backward"): BLOCKS,
    }
    assert all(one.ranks == (0, 1, 2, 3) for one in sharded.collectives)


def test_matrices_are_multiplied_three_times_as_often_as_forward(alone: Trace) -> None:
    tokens, targets = alone.tokens, alone.targets
    forward = 2 * tokens * BLOCKS * (BLOCK - 2 * WIDTH) + 2 * targets * VOCABULARY * WIDTH
    done = sum(one.flops * one.count for one in alone.work if one.kind == "matmul")
    assert done == pytest.approx(3 * forward, rel=0.001)


def test_what_is_computed_again_is_marked() -> None:
    trace = seen("sharding=single", "sharding.activation_checkpointing=true")
    again = sum(one.flops * one.count for one in trace.work if one.kind == "matmul" and one.again)
    blocks = 2 * trace.tokens * BLOCKS * (BLOCK - 2 * WIDTH)
    # torch stops a recomputation once it has all that it wants: the last product of a block is not among that
    assert again == pytest.approx(blocks - 2 * trace.tokens * BLOCKS * WIDTH * INNER, rel=0.001)
    plain = seen("sharding=single")
    assert trace.moments["forward:head"].causes["activations"] < plain.moments["forward:head"].causes["activations"]


def test_micro_batches_that_are_alike_are_counted_as_often_as_they_come(alone: Trace) -> None:
    whole = seen("sharding=single", micro=8)
    assert (alone.micro, whole.micro) == (4, 1)
    matmuls = [sum(one.flops * one.count for one in t.work if one.kind == "matmul") for t in (alone, whole)]
    assert matmuls[0] == pytest.approx(matmuls[1], rel=1e-6)


def test_lengths_of_rows_decide_the_batch() -> None:
    trace = seen("sharding=single", micro=8, rows=[(3, 7)])
    assert (trace.tokens, trace.targets) == (8 * 10, 8 * 7)


def test_replicas_sum_all_their_gradients() -> None:
    trace = seen("sharding=ddp", processes=2)
    sent = sum(one.bytes * one.count for one in trace.collectives if one.phase == "backward")
    assert sent == 4 * PARAMETERS


def test_another_rank_can_be_asked(sharded: Trace) -> None:
    other = seen("sharding=fsdp", processes=4, rank=3)
    assert other.rank == 3
    assert other.kept["parameters"] <= sharded.kept["parameters"]


def test_what_is_offloaded_lies_in_the_hosts_memory() -> None:
    trace = seen("sharding=fsdp", "sharding.offload=true", "hardware.kind=cuda", processes=4)
    assert trace.host["optimizer"] == pytest.approx(8 * PARAMETERS / 4, rel=0.1)  # small tensors take 512 bytes each
    assert "optimizer" not in trace.peak.causes


def test_nothing_is_left_in_the_process(alone: Trace) -> None:
    resize = torch.UntypedStorage.resize_
    seen("sharding=single")
    assert not dist.is_initialized()
    assert _get_current_dispatch_mode() is None
    assert torch.UntypedStorage.resize_ is resize
    assert type(torch.zeros(1)) is torch.Tensor


def test_a_world_that_cannot_be_divided_is_refused_and_leaves_nothing() -> None:
    with pytest.raises(UserError, match="3 processes cannot be divided"):
        seen("sharding=fsdp", "sharding.replicate=2", processes=3)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "words",
    [
        ("adapter=lora",),
        ("adapter=qlora", "precision=bf16"),
        ("objective=dpo",),
        ("objective=reward",),
        ("objective=distill", "roles.teacher.model.attention=sdpa"),
        ("objective=grpo", "reward=[length]", "reward.length.longest=9", "objective.max_new_tokens=8"),
        ("adapter=bottleneck",),
        ("sharding.tensor=2",),
        ("sharding.sequence=2",),
    ],
    ids=lambda words: words[0],
)
def test_it_goes_through(words: tuple[str, ...]) -> None:
    trace = seen("sharding=fsdp", *words, processes=2 if "sharding" not in words[0] else 4)
    assert trace.peak.bytes > 0
    assert Trace.of(trace.plain()) == trace
