"""Seeds, and the collectives of a process alone and of one that shares its rows. Several: tests/runs."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from loomtune import world as worlds
from loomtune.world import World, derive, reseed

RECORDED = 61364016176650485
"""Recorded once: another number would change every run that is resumed."""


def world(**more: object) -> World:
    return World(0, 1, 0, torch.device("cpu"), **more)


def test_a_seed_is_the_same_on_every_machine_and_version() -> None:
    assert derive(0, "dropout", "layers.0") == RECORDED


def test_the_border_between_parts_counts() -> None:
    assert len({derive("ab", "c"), derive("a", "bc"), derive("abc"), derive("a", "b", "c")}) == 4


@pytest.mark.parametrize("part", range(20))
def test_a_seed_is_one_that_every_generator_takes(part: int) -> None:
    assert 0 <= derive(part) < 2**63


def test_global_states_depend_on_seed_step_and_rank_alone() -> None:
    def drawn(*arguments: int) -> tuple[float, float]:
        reseed(*arguments)
        return random.random(), float(torch.rand(()))

    first = drawn(0, 5, 1)
    assert drawn(0, 6, 1) != first and drawn(1, 5, 1) != first and drawn(0, 5, 0) != first
    assert drawn(0, 5, 1) == first


def test_a_process_alone_is_its_own_world() -> None:
    alone = world()
    assert alone.leads
    assert alone.sum([1.0, 2.5]) == alone.total([1.0, 2.5]) == [1.0, 2.5]
    assert alone.gather("x") == ["x"] and alone.broadcast("x") == "x"
    assert alone.gather_tensor(torch.ones(2, 3)).shape == (2, 3)
    alone.barrier()
    assert alone.memory_bytes() > 1 << 20, "bytes, not kilobytes"


def test_a_rank_with_another_s_rows_adds_nothing_to_sums_over_rows() -> None:
    second = world(counts=False)
    assert second.sum([1.0, 2.5]) == [0.0, 0.0]
    assert second.total([1.0, 2.5]) == [1.0, 2.5]


def test_one_process_joins_without_a_rendezvous_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    try:
        joined = worlds.join()
        assert (joined.rank, joined.size, joined.control) == (0, 1, None)
        assert dist.get_world_size() == 1, "device meshes ask for a group"
    finally:
        worlds.leave()
    assert not dist.is_initialized()
    worlds.leave()
