"""A trained run, opened to be measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from loomtune import api
from loomtune.errors import UserError
from loomtune.feed import Feed
from loomtune.plan import Plan
from loomtune.session import collated, drawn, looked_at, opened
from loomtune.testing import toy
from loomtune.worker import execute
from loomtune_plugins.kernels.sdpa import SDPA
from support import signals_kept


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session") / "run"
    given = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single", "tracker=[jsonl]"]
    return api.prepare(api.compose([*given, "steps=2", "checkpoint.every=1", f"run.dir={folder}"]))


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Path:
    """A run of two steps, made in this process."""
    with signals_kept():
        execute(Plan.load(prepared), prepared, toy.world())
    return prepared


def test_a_run_without_a_checkpoint_cannot_be_opened(tmp_path: Path, prepared: Path) -> None:
    for best, what in ((False, "has no checkpoint"), (True, "has no best checkpoint")):
        with pytest.raises(UserError, match=what), opened(Plan.load(prepared), tmp_path, best=best):
            pass
    assert not dist.is_initialized()


def test_an_opened_run_has_the_latest_weights_and_leaves_the_folder_alone(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with opened(Plan.load(trained), trained) as run:
        assert run.step == 2
        weights = dict(run.policy.engine.stream_weights())
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    stored = load_file(trained / "checkpoints" / "step-00000002" / "model" / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    assert not dist.is_initialized()


def test_samples_that_would_share_a_row_are_shown_not_to_see_each_other(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attention(self: Any, batch: Any, dtype: Any) -> Mapping[str, Any]:
        return {"attention_mask": batch.tokens.new_ones(batch.tokens.shape)}  # causal over the whole row

    monkeypatch.setattr(SDPA, "attention", attention)
    with opened(api.resumed(trained, []), trained):
        pass
    with pytest.raises(UserError, match="see each other"), opened(api.resumed(trained, ["packing=true"]), trained):
        pass
    assert not dist.is_initialized()


def test_a_run_is_looked_at_without_a_network_and_without_a_folder(prepared: Path, tmp_path: Path) -> None:
    given = [text for text in Plan.load(prepared).overrides if not text.startswith("run.dir")]
    run = looked_at(api.compose([*given, f"run.dir={tmp_path / 'never'}"]))
    assert not run.roles and not (tmp_path / "never").exists() and not dist.is_initialized()
    assert run.splits["train"].key == json.loads((prepared / "samples.json").read_text())["train"]["key"]


def test_the_rows_that_are_looked_at_are_those_of_the_run_s_steps(prepared: Path) -> None:
    run = looked_at(Plan.load(prepared))
    feed = Feed(run)
    for rows in islice(drawn(run, "train"), 10):
        samples, _ = feed.next()
        assert [run.splits["train"][row].segments[0].tokens.tolist() for row in rows] == [
            sample.segments[0].tokens.tolist() for sample in samples
        ]


def test_a_step_that_is_looked_at_holds_every_rank_s_share(prepared: Path) -> None:
    run = looked_at(Plan.load(prepared))
    several = replace(run, world=replace(run.world, replicas=3))
    batches = collated(several, "train", range(8))
    assert sorted(number for batch in batches for number in batch.sample_numbers.tolist()) == list(range(8))
    assert len(batches) % 3 == 0
