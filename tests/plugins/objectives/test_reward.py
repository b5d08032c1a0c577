"""Reward models: where an answer is read, and recorded numbers of TRL."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune.contracts.batch import NO_PARENT
from loomtune.errors import UserError
from loomtune.testing import check_objective, loss_of
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.reward import RewardModel
from loomtune_plugins.objectives.reward_settings import RewardSettings

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared")) / "references"
ROWS = [
    {"prompt": "a loom ", "chosen": "weaves cloth", "rejected": "flies", "better": 0},
    {"prompt": "warp ", "chosen": "and weft", "rejected": "and then some", "better": 0.5},
]


def test_it_keeps_the_contract() -> None:
    check_objective(RewardModel(RewardSettings(center=0.1, margin="better")), ROWS)


def test_a_reward_is_read_at_the_last_token_of_an_answer() -> None:
    objective, tokenizer = RewardModel(RewardSettings()), ToyTokenizer()
    for limit in (100, 12):
        prompt, *answers = objective.sample(ROWS[1], tokenizer, limit).segments
        assert not prompt.is_target.any() and prompt.parent == NO_PARENT
        assert len(prompt.tokens) + max(len(answer.tokens) for answer in answers) <= limit
        for answer in answers:
            assert answer.is_target.tolist() == [False] * (len(answer.tokens) - 1) + [True]


def test_a_row_whose_answer_is_cut_off_has_no_target() -> None:
    assert RewardModel(RewardSettings()).sample(ROWS[0], ToyTokenizer(), 6).targets == 0


def test_a_margin_that_a_row_has_not_is_said_of_the_row() -> None:
    objective = RewardModel(RewardSettings(margin="beter"))
    with pytest.raises(ValueError, match="has None as its beter"):
        objective.sample(ROWS[0], ToyTokenizer(), 100)


def test_a_mistyped_margin_is_told_with_the_columns_that_there_are() -> None:
    objective = RewardModel(RewardSettings(margin="margn"))
    told = r"has None as its margn.* it has prompt, chosen, rejected, margin\. Did you mean 'margin'\?"
    with pytest.raises(ValueError, match=told):
        objective.sample({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}, ToyTokenizer(), 100)


def test_an_order_that_nobody_named_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"has no chosen answer; it has prompt, answers: set data.answers=answers"):
        RewardModel(RewardSettings()).sample({"prompt": "a", "answers": ["b", "c"]}, ToyTokenizer(), 100)


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective\.center=-1"):
        RewardModel(RewardSettings(center=-1.0))


@pytest.fixture(scope="module")
def recorded() -> dict:
    if not (SHARED / "reward.json").is_file():
        pytest.skip(f"no recorded references in {SHARED}")
    return json.loads((SHARED / "reward.json").read_text())


def policy(recorded: dict) -> LlamaForCausalLM:
    config = json.loads((SHARED / "tiny_llama_config.json").read_text())
    config.pop("architecture")
    module = LlamaForCausalLM(LlamaConfig(**config))
    module.load_state_dict(load_file(SHARED / "tiny_policy.safetensors"))
    module.score = nn.Linear(module.config.hidden_size, 1, bias=False)
    module.score.weight.data = torch.tensor(recorded["score_weight"]).reshape(1, -1)
    return module


@pytest.mark.parametrize("name", ["bt", "bt_margin"])
def test_loss_and_gradients_are_those_recorded(recorded, name) -> None:
    case = next(case for case in recorded["cases"] if case["name"] == name)
    module = policy(recorded)
    margin = {"margin": case["margin"]} if case["margin"] else {}
    found = loss_of("reward", case["args"], recorded["batch"] | margin, module)
    assert found.loss == pytest.approx(case["loss"], rel=1e-4)
    norms = {name: p.grad.norm() for name, p in module.named_parameters() if p.grad is not None}
    assert torch.stack([*norms.values()]).norm().item() == pytest.approx(case["grad"]["global_l2"], rel=1e-3)
    for key, norm in case["grad"]["per_param_l2"].items():
        if key in norms:
            assert norms[key].item() == pytest.approx(norm, rel=1e-3), key
    assert found.metrics["accuracy"] == case["metrics"]["accuracy"]
    assert found.metrics["margin"] == pytest.approx(case["metrics"]["margin"], rel=1e-4)


def test_centring_adds_the_square_of_the_sum(recorded) -> None:
    plain = loss_of("reward", {}, recorded["batch"], policy(recorded)).loss
    centred = loss_of("reward", {"center_rewards_coefficient": 0.01}, recorded["batch"], policy(recorded)).loss
    rewards = recorded["rewards"]
    squares = [(rewards[i] + rewards[i + 4]) ** 2 for i in range(4)]
    assert centred - plain == pytest.approx(0.01 * sum(squares) / 4, rel=1e-3)
