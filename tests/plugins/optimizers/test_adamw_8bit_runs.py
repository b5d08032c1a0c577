"""Moments of 8 bits in whole runs: to the bit where they were written, refused where they mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loomtune import api
from loomtune.errors import UserError
from runs.worlds import Failed, Outcome, Worlds

pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")


@pytest.fixture(scope="module")
def settings(tied_model: Path, mixed_data: Path) -> list[str]:
    """A run in which embeddings have moments of 8 bits and norms of 32."""
    return [
        f"model.path={tied_model}",
        "data=jsonl",
        f"data.path={mixed_data}",
        "optimizer=adamw_8bit",
        "optimizer.lr=1e-3",
        "batch.size=4",
        "steps=6",
        "tracker=[jsonl]",
        "checkpoint.background=false",
        "checkpoint.every=3",
    ]


@pytest.fixture
def train(worlds: Worlds, settings: list[str], tmp_path: Path) -> Callable[..., Outcome]:
    def run(size: int, name: str, *more: str) -> Outcome:
        return worlds.train(size, [*settings, *more], tmp_path / name)

    return run


@pytest.mark.parametrize("how", ["sharding=fsdp", pytest.param("sharding=ddp", marks=pytest.mark.slow)])
def test_a_run_goes_on_to_the_bit_in_its_layout_and_no_other_can_read_parts_of_blocks(
    how: str, train: Callable[..., Outcome], worlds: Worlds
) -> None:
    whole = train(2, "whole", how)
    stopped = train(2, "stopped", how, "stop_after=3")
    assert len(stopped.lines) == 3
    if how == "sharding=fsdp":
        with pytest.raises(Failed, match=r"can be read only under the layout that wrote it .* same sharding and"):
            worlds.resume(1, stopped.folder, "sharding=single")
    assert worlds.resume(2, stopped.folder, how).lines == whole.lines


@pytest.mark.slow
def test_replicas_hold_whole_blocks_which_one_process_can_read(train: Callable[..., Outcome], worlds: Worlds) -> None:
    alone = train(1, "alone", "sharding=single")
    stopped = train(2, "stopped", "sharding=ddp", "stop_after=3")
    resumed = worlds.resume(1, stopped.folder, "sharding=single")
    assert resumed.series("loss") == pytest.approx(alone.series("loss"), rel=1e-3)
    sharded = train(2, "sharded", "sharding=fsdp")
    assert sharded.series("loss") == pytest.approx(alone.series("loss"), rel=1e-2)  # blocks begin elsewhere


def test_deepspeed_shows_no_parameters_to_block_by_block_moments(settings: list[str]) -> None:
    with pytest.raises(UserError, match="DeepSpeed's optimizer sees flat parts of parameters"):
        api.check(api.compose([*settings, "sharding=zero"], processes=2))
