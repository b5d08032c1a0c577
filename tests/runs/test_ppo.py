"""Whole runs of PPO: the same on every layout, resumed in the middle of a batch, and with all four roles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from runs.rolled import LAYOUTS, SOON, apart
from runs.worlds import Worlds
from runs.writing import written

MICRO = "batch.micro=16"
LOSSES = ("loss", "policy", "value", "kl", "ratio/mean", "returns/mean")


@pytest.fixture(scope="session")
def brief(tied_model: Path, mixed_data: Path) -> list[str]:
    """Two batches of 8 prompts, of each of which come four steps."""
    models = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "rollout=huggingface"]
    ppo = ["objective=ppo", "objective.max_new_tokens=10", "objective.epochs=2", "objective.minibatches=2"]
    adapts = ["objective.kl_target=0.01", "objective.missing_eos_penalty=0.5", "objective.beta=0.2"]
    reward = ["reward=[length]", "reward.length.shortest=10", "reward.length.margin=10"]
    how = ["batch.size=8", "steps=8", "optimizer.lr=3e-3", "tracker=[jsonl]", "checkpoint.background=false"]
    return [*models, *ppo, *adapts, *reward, *how]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A run on one process, made once for each set of settings."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(*settings: str) -> dict[str, Any]:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*settings, "sharding=single"], folder, work=written).result
        return made[settings]

    return of


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in LAYOUTS]
)
@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["objective.value=model"], marks=pytest.mark.slow),
        pytest.param(["adapter=lora"], marks=pytest.mark.slow),
        pytest.param(["objective.group=2"], marks=pytest.mark.slow),
    ],
    ids=["head", "model", "lora", "group"],
)
def test_every_layout_draws_and_learns_the_same(
    layout: str, more: list[str], worlds: Worlds, alone: Callable[..., Any], brief: list[str], tmp_path: Path
) -> None:
    if "adapter=lora" in more and "tensor" in layout:
        pytest.skip("linear layers that are wrapped are not cut")
    size, how = LAYOUTS[layout]
    one = alone(*brief, *more)
    other = worlds.train(size, [*brief, *more, *how], tmp_path / "run", work=written).result
    found = apart(one, other, LOSSES)
    assert all(value < 1e-5 for value in found.values()), found
    assert apart(one, other, ["grad_norm"])["grad_norm"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp on 2", "zero 3 on 2"])
def test_ten_updates_of_64_prompts_of_64_tokens_are_the_same_on_every_layout(
    layout: str, worlds: Worlds, alone: Callable[..., Any], real: list[str], tmp_path: Path
) -> None:
    """Of one batch: what a second one draws hangs on weights that fp32 lets part, where two tokens are a toss-up."""
    ppo = ["objective=ppo", "objective.max_new_tokens=64", "objective.epochs=5", "objective.minibatches=2"]
    reward = ["reward=[length]", "reward.length.shortest=64", "reward.length.margin=64"]
    how = ["batch.size=64", "steps=10", "rollout=huggingface", "objective.missing_eos_penalty=0.5"]
    size, laid = LAYOUTS[layout]
    laid = [MICRO if text.startswith("batch.micro") else text for text in laid]
    one = alone(*real, *ppo, *reward, *how)
    other = worlds.train(size, [*real, *ppo, *reward, *how, *laid], tmp_path / "run", work=written).result
    found = apart(one, other, ["loss", "policy", "value"])
    assert all(value < 1e-4 for value in found.values()), found


@pytest.mark.parametrize("where", [pytest.param("head", marks=pytest.mark.slow), "model"])
def test_a_run_that_is_stopped_within_a_batch_goes_on_exactly(
    where: str, worlds: Worlds, brief: list[str], tmp_path: Path
) -> None:
    chosen = [*brief, f"objective.value={where}", "sharding=single"]
    whole = worlds.train(1, chosen, tmp_path / "whole")
    worlds.train(1, [*chosen, "stop_after=6"], tmp_path / "run")
    resumed = worlds.resume(1, tmp_path / "run")
    assert resumed.lines == whole.lines and len(whole.lines) == 8
    coefficients = [line["kl/coefficient"] for line in whole.lines if "kl/coefficient" in line]
    assert len(coefficients) == 2 and coefficients[0] != coefficients[1], "it adapts, and was kept"


@pytest.mark.slow
def test_the_value_head_is_kept_in_checkpoints_and_left_out_of_exports(
    worlds: Worlds, brief: list[str], tmp_path: Path
) -> None:
    worlds.train(1, [*brief, "sharding=single", "stop_after=1"], tmp_path / "run")
    out = api.export(tmp_path / "run", tmp_path / "out", check=False)
    (kept,) = (tmp_path / "run" / "checkpoints").glob("step-*/model/heads.safetensors")
    assert kept.is_file() and not (out / "heads.safetensors").exists()
