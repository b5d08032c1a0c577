"""Ranks as a grid: who stands where, who shares rows, and which worlds cannot be divided."""

from __future__ import annotations

import itertools

import pytest

from loomtune.errors import UserError
from loomtune_plugins.shardings.grid import Grid


def test_tensor_neighbours_come_first_then_sequence_neighbours() -> None:
    grid = Grid.of(24, replicate=2, sequence=3, tensor=2)
    assert grid == Grid(replicate=2, shard=2, sequence=3, tensor=2)
    assert [grid.place(rank) for rank in range(24)] == list(itertools.product(range(2), range(2), range(3), range(2)))


def test_ranks_that_differ_only_in_sequence_or_tensor_get_the_same_rows() -> None:
    grid = Grid.of(12, sequence=3, tensor=2)
    assert [grid.replica(rank) for rank in range(12)] == [(0, 2)] * 6 + [(1, 2)] * 6


def test_copies_of_the_whole_get_different_rows() -> None:
    grid = Grid.of(8, replicate=4)
    assert [grid.replica(rank) for rank in range(8)] == [(rank, 8) for rank in range(8)]


@pytest.mark.parametrize(
    ("size", "asked", "said", "cure"),
    [
        (6, {"tensor": 4}, "6 processes cannot be divided by sharding.tensor=4", "set sharding.tensor=3, or launch"),
        (8, {"tensor": 2, "sequence": 3}, "tensor=2 x sharding.sequence=3", "sequence=2, or launch a multiple of 6 "),
        (
            8,
            {"tensor": 2, "replicate": 8},
            "tensor=2 x sharding.replicate=8",
            "replicate=4, or launch a multiple of 16",
        ),
        (8, {"sequence": 0}, "by sharding.sequence=0", "set sharding.sequence=1, or launch a multiple of 1 processes"),
        (3, {"replicate": -1}, "by sharding.replicate=-1", "set sharding.replicate=1, "),
    ],
)
def test_a_world_that_cannot_be_divided_is_refused_with_the_nearest_number_that_can(
    size: int, asked: dict[str, int], said: str, cure: str
) -> None:
    with pytest.raises(UserError) as error:
        Grid.of(size, **asked)
    assert said in str(error.value) and cure in str(error.value)


def test_a_world_of_unknown_size_is_not_refused() -> None:
    assert Grid.of(0, tensor=2).shard == 0
