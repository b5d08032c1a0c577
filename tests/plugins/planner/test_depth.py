"""Deep models from shallow ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loomtune_plugins.planner.depth import continued, deep, departure, depths
from loomtune_plugins.planner.trace import Collective, Peak, Trace, Work


def line(blocks: float, *, bend: int = 0) -> Trace:
    """A trace that grows evenly, and, with a bend, does not."""
    count, extra = int(blocks), bend * int(blocks) ** 2
    return Trace(
        rank=0,
        processes=2,
        blocks=blocks,
        moments={
            "forward:head": Peak(1000 + 10 * count + extra, {"parameters": 1000, "activations": 10 * count + extra}),
            "optimizer": Peak(500 + 40 * count, {"parameters": 500, "optimizer": 40 * count}),
        },
        kept={"parameters": 100 * count},
        host={},
        collectives=[
            Collective("all_gather", 64, (0, 1), "forward", "fp32", count=count),
            Collective("all_reduce", 7 * count, (0, 1), "backward", "fp32", count=1),
        ],
        work=[Work("matmul", "bf16", "forward", (1, 2, 3, 4), 48.0, 10.0, count=3 * count)],
        tokens=8,
        targets=4,
        micro=1,
        parameters=(10 * count, 5 * count, 10 * count),
    )


def test_the_peak_may_lie_in_another_moment_of_a_deeper_model() -> None:
    made = continued(line(3), line(5), 80)
    assert line(3).peak.bytes == line(3).moments["forward:head"].bytes
    assert made.peak.bytes == 500 + 40 * 80
    assert made == replace(line(80), moments=made.moments, collectives=made.collectives, work=made.work)


def test_messages_that_grow_are_continued_by_their_bytes() -> None:
    made = continued(line(3), line(5), 80)
    assert {(one.operation, one.bytes, one.count) for one in made.collectives} == {
        ("all_gather", 64, 80),
        ("all_reduce", 560, 1),
    }
    (work,) = made.work
    assert (work.count, work.flops) == (240, pytest.approx(48.0))


def test_shallow_depths_leave_over_what_the_whole_leaves() -> None:
    assert depths(80, 1) == (3, 5, 8)
    assert depths(26, 2) == (6, 10, 16)
    assert depths(27, 2) == (7, 11, 17)
    assert depths(8, 1) == depths(26, 6) == depths(0, 0) == ()


def test_what_does_not_grow_evenly_is_traced_whole() -> None:
    asked: list[int] = []

    def trace(blocks: int) -> Trace:
        asked.append(blocks)
        return line(blocks, bend=9)

    made = deep(trace, 80, 1)
    assert asked == [3, 5, 8, 80]
    assert made.moments == line(80, bend=9).moments
    assert "forward:head" in made.notes[-1]


def test_even_growth_is_continued_and_said() -> None:
    made = deep(line, 80, 1)
    assert made.blocks == 80
    assert made.notes == ("continued from 3, 5, 8 blocks",)
    assert departure(made, line(80)) is None
