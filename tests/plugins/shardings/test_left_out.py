"""A head that some micro-batches leave out, where gradients are cut after each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Engine, Role
from loomtune.testing import toy
from loomtune.toolkit import log_probs
from loomtune.world import World
from ranks import together
from toys import sample

WAYS: list[dict[str, Any]] = [{}, {"replicate": 2}, {"accumulate_sharded": False}]


def plain(of: Engine) -> Tensor:
    batch = collate([sample("warp")], range(1), toy.ToyTokenizer.pad_id)
    return -log_probs(Role("policy", of), batch).sum() / 10


def with_head(of: Engine) -> Tensor:
    batch = collate([sample("warp")], range(1), toy.ToyTokenizer.pad_id)
    values: Tensor = Role("value", of, head="value").read(batch, lambda view: view.heads["value"](view.states))
    return plain(of) + values.square().sum()


def norms(settings: dict[str, Any]) -> list[float]:
    """Of steps with the head in both micro-batches, in the last alone and in the first alone."""
    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    sharding = installed().build("sharding", "fsdp", settings)
    sharding.check(world.size)
    one, found = sharding.engine(toy.spec(heads=("lm", "value")), world), []
    for parts in ((with_head, with_head), (plain, with_head), (with_head, plain)):
        for number, part in enumerate(parts):
            with one.accumulating(last=number == 1):
                one.backward(part(one))
        found.append(one.step(0.0, 0.0, lambda norm: True))
    return found


def every_way() -> list[list[float]]:
    return [norms(settings) for settings in WAYS]


def test_a_head_that_a_micro_batch_leaves_out_counts_where_it_is_used(tmp_path: Path) -> None:
    found, same = together(2, tmp_path, every_way)
    assert found == same
    for both, last, first in found:
        assert last == pytest.approx(first, rel=1e-6) and both != pytest.approx(last, rel=1e-3)
        assert [both, last, first] == pytest.approx(found[0], rel=1e-5)
