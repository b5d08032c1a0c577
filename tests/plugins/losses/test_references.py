"""Losses of pairs against recorded numbers of TRL, whole: tokens, masks, sums, loss and gradients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune.errors import UserError
from loomtune.testing import loss_from_log_probs, loss_of

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared")) / "references"
there = (SHARED / "dpo_family.json").is_file()
pytestmark = pytest.mark.skipif(not there, reason=f"no recorded references in {SHARED}")


def recorded(name: str) -> dict:
    return json.loads((SHARED / f"{name}.json").read_text())


def model(name: str) -> LlamaForCausalLM:
    config = json.loads((SHARED / "tiny_llama_config.json").read_text())
    config.pop("architecture")
    module = LlamaForCausalLM(LlamaConfig(**config))
    module.load_state_dict(load_file(SHARED / f"tiny_{name}.safetensors"))
    return module


def cases() -> list:
    if not there:
        return []
    objectives = {"orpo": "orpo", "cpo": "cpo", "cposimpo": "cpo"}
    family = [("dpo_family", "dpo", case) for case in recorded("dpo_family")["cases"]]
    others = recorded("orpo_cpo_simpo")["cases"]
    return [*family, *(("orpo_cpo_simpo", objectives[case["name"].partition("_")[0]], case) for case in others)]


@pytest.mark.parametrize(
    ("file", "objective", "case"), cases(), ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_loss_and_gradients_are_those_recorded(file, objective, case) -> None:
    policy = model("policy")
    found = loss_of(objective, case["args"], recorded(file)["batch"], policy, model("reference"))
    assert found.loss == pytest.approx(case["loss"], rel=1e-4)
    norm = torch.stack(
        [parameter.grad.norm() for parameter in policy.parameters() if parameter.grad is not None]
    ).norm()
    assert norm.item() == pytest.approx(case["grad"]["global_l2"], rel=1e-3)
    for name, norm in case["grad"].get("per_param_l2", {}).items():
        assert policy.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    if objective == "dpo":
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert found.metrics[name] == pytest.approx(case["metrics"][name], rel=1e-4), name


def test_entropy_is_that_recorded() -> None:
    data = recorded("dpo_family")
    found = loss_of("dpo", {"entropy": True}, data["batch"], model("policy"), model("reference"))
    assert found.metrics["entropy"] == pytest.approx(data["cases"][0]["metrics"]["entropy"], rel=1e-4)


def test_recorded_log_probabilities_alone_give_the_same_losses() -> None:
    data = recorded("dpo_family")
    policy, reference, tokens = (data[key] for key in ("policy_sum_logps", "reference_sum_logps", "completion_tokens"))
    for case in data["cases"]:
        if case["args"].get("use_weighting"):
            continue  # it looks at the distribution behind each token
        found = loss_from_log_probs(
            "dpo", case["args"], policy[:4], policy[4:], tokens[:4], tokens[4:], reference[:4], reference[4:]
        )
        assert found.loss == pytest.approx(case["loss"], rel=1e-4), case["name"]


def test_a_mixture_is_the_weighted_sum() -> None:
    data = recorded("dpo_family")

    def loss(**settings) -> float:
        return loss_of("dpo", settings, data["batch"], model("policy"), model("reference")).loss

    mixed = loss(loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.2])
    assert mixed == pytest.approx(0.7 * loss(loss_type="sigmoid") + 0.2 * loss(loss_type="sft"), rel=1e-6)


def test_a_loss_that_compares_with_a_reference_is_refused_without_one() -> None:
    with pytest.raises(UserError, match="loss=apo_zero compares with a reference"):
        loss_of("simpo", {"loss_type": "apo_zero"}, recorded("dpo_family")["batch"], model("policy"))
