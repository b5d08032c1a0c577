"""A trained run, opened to be measured."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from loomtune import api
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune.session import opened
from loomtune.signals import StopRequest
from loomtune.testing import toy
from loomtune.worker import execute


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session") / "run"
    given = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single", "tracker=[jsonl]"]
    return api.prepare(api.compose([*given, "steps=2", "checkpoint.every=1", f"run.dir={folder}"]))


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Iterator[Path]:
    """A run of two steps, made in this process, which keeps its own answers to signals."""
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    execute(Plan.load(prepared), prepared, toy.world())
    yield prepared
    for number, handler in before.items():
        signal.signal(number, handler)


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
