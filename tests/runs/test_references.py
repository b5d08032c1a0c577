"""Losses, gradient norms, log-probabilities and one optimizer step that another trainer recorded, met by whole runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loomtune.plan import Plan
from loomtune.session import opened
from loomtune.toolkit import log_probs
from runs.worlds import Outcome
from support import shared, write_rows

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single, micro-batches of 4": (1, ["sharding=single", "batch.micro=4"]),
    "single, micro-batches of 2": (1, ["sharding=single", "batch.micro=2"]),
    "single, micro-batches of 1": (1, ["sharding=single", "batch.micro=1"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "fsdp on 3": (3, ["sharding=fsdp"]),
}
OPTIMIZERS = {"sgd": ["optimizer=sgd"], "adamw_torch": ["optimizer=adamw"]}

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared("references", "sft.json").read_text())
    return found


@pytest.fixture(scope="module")
def settings(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One step over the recorded rows, from the recorded weights."""
    folder = tmp_path_factory.mktemp("recorded")
    for path in shared("references", "tokenizer").iterdir():
        shutil.copy(path, folder)
    config = json.loads(shared("references", "tiny_llama_config.json").read_text())
    attention = config.pop("attn_implementation")
    config |= {"model_type": "llama", "architectures": [config.pop("architecture")]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(shared("references", "tiny_policy.safetensors"), folder / "model.safetensors")
    rows = write_rows(folder / "rows.jsonl", recorded["rows"])
    model = [f"model.path={folder}", f"model.attention={attention}", "data=jsonl", f"data.path={rows}"]
    return [*model, "batch.size=4", "steps=1", "schedule=constant", "tracker=[jsonl]"]


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for path in (outcome.folder / "checkpoints" / "step-00000001" / "model").glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["completion_only", "full_sequence"])
def test_loss_and_gradient_norm_are_those_recorded(
    layout: str, name: str, recorded: dict[str, Any], settings: list[str], train: Train
) -> None:
    case = next(case for case in recorded["cases"] if case["name"] == name)
    size, how = LAYOUTS[layout]
    learned = "completion" if case["args"]["completion_only_loss"] else "all"
    run = train(size, [*settings, f"objective.train_on={learned}", "optimizer=sgd", "optimizer.clip=0", *how])
    (line,) = run.lines
    assert line["tokens"] == case["num_target_tokens"]
    assert line["loss"] == pytest.approx(case["loss"], rel=1e-4)
    assert line["grad_norm"] == pytest.approx(case["grad"]["global_l2"], rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_gives_the_recorded_weights(
    layout: str, optimizer: str, recorded: dict[str, Any], settings: list[str], train: Train
) -> None:
    step = next(step for step in recorded["one_step"] if step["optimizer"] == optimizer)
    size, how = LAYOUTS[layout]
    chosen = [*OPTIMIZERS[optimizer], f"optimizer.lr={step['lr']}", "optimizer.weight_decay=0", "optimizer.clip=0"]
    run = train(size, [*settings, *chosen, *how])
    (line,) = run.lines
    assert line["loss"] == pytest.approx(step["logged_loss"], rel=1e-4)
    assert line["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-3)
    after = weights(run)
    sample = after["model.layers.0.self_attn.q_proj.weight"].flatten()[: len(step["q_proj0_after"])]
    assert sample.tolist() == pytest.approx(step["q_proj0_after"], rel=1e-5)
    total = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in after.values()))
    assert total == pytest.approx(step["params_l2_after"], rel=1e-7)


def test_each_log_probability_is_that_recorded(recorded: dict[str, Any], settings: list[str], train: Train) -> None:
    run = train(1, [*settings, "optimizer.lr=0", "optimizer.weight_decay=0", "sharding=single"])
    expected = [
        logp
        for logps, labels in zip(recorded["token_logps"], recorded["batch"]["labels"], strict=True)
        for logp, label in zip(logps, labels[1:], strict=True)
        if label != -100
    ]
    with opened(Plan.load(run.folder), run.folder) as trained, trained.policy.engine.evaluating():
        found: dict[int, list[float]] = {}
        for batch in trained.batches("train"):
            values = log_probs(trained.roles["policy"], batch)
            for number, value in zip(batch.sample_numbers[batch.sample_of_segment[batch.row]], values, strict=True):
                found.setdefault(int(number), []).append(float(value))
    assert [value for number in sorted(found) for value in found[number]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
