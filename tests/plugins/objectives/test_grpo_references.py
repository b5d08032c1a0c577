"""GRPO's family and RLOO against recorded numbers of TRL: advantages, losses, gradients and what is logged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune.errors import UserError
from loomtune.testing import loss_from_token_log_probs, loss_of
from loomtune.testing.recorded import Recorded, built

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared")) / "references"
there = (SHARED / "grpo.json").is_file()
pytestmark = pytest.mark.skipif(not there, reason=f"no recorded references in {SHARED}")

LAYOUT = ("prompt_ids", "prompt_mask", "completion_ids_padded", "completion_mask")


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHARED / f"{name}.json").read_text())
    return found


def cases(name: str) -> list[Any]:
    return recorded(name)["cases"] if there else []


def model(name: str) -> LlamaForCausalLM:
    config = json.loads((SHARED / "tiny_llama_config.json").read_text())
    config.pop("architecture")
    module = LlamaForCausalLM(LlamaConfig(**config))
    module.load_state_dict(load_file(SHARED / f"tiny_{name}.safetensors"))
    return module


def batch(case: dict[str, Any] | None = None, *extra: str) -> dict[str, Any]:
    """The recorded completions, with a case's advantages. extra: of which policies log-probabilities are wanted."""
    data = recorded("grpo")
    given = {key: data[key] for key in (*LAYOUT, *(f"{name}_token_logps" for name in extra))}
    return given if case is None else given | {"advantages": case["advantages"]}


def norm(module: LlamaForCausalLM) -> float:
    return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())


def off_policy(case: dict[str, Any]) -> bool:
    """At another temperature the old policy's log-probabilities are others, of which only sums were kept."""
    return case["args"].get("temperature", 1.0) == 1.0


@pytest.mark.parametrize("case", [c for c in cases("grpo") if off_policy(c)], ids=lambda case: case["name"])
def test_loss_and_gradients_of_completions_of_an_older_policy(case: dict[str, Any]) -> None:
    policy = model("policy")
    found = loss_of("grpo", case["args"], batch(case, "old"), policy)
    assert found.loss == pytest.approx(case["loss_off_policy"], rel=1e-4)
    assert norm(policy) == pytest.approx(case["grad_off_policy"]["global_l2"], rel=1e-3)
    for name, value in case["grad_off_policy"].get("per_param_l2", {}).items():
        assert policy.get_parameter(name).grad.norm().item() == pytest.approx(value, rel=1e-3), name
    assert found.metrics["entropy"] == pytest.approx(case["metrics"]["entropy"], rel=1e-4)
    for ours, theirs in (("clip/low", "clip_ratio/low_mean"), ("clip/high", "clip_ratio/high_mean")):
        if theirs in case["metrics"]:
            assert found.metrics[ours] == pytest.approx(case["metrics"][theirs], rel=1e-4)


@pytest.mark.parametrize("case", cases("grpo"), ids=lambda case: case["name"])
def test_loss_of_completions_of_this_very_policy(case: dict[str, Any]) -> None:
    found = loss_of("grpo", case["args"], batch(case), model("policy"))
    assert found.loss == pytest.approx(case["loss_on_policy_old_none"], rel=1e-4, abs=1e-7)
    assert found.metrics["entropy"] == pytest.approx(case["metrics"]["entropy"], rel=1e-4)
    assert found.metrics["ratio/max"] == found.metrics["ratio/min"] == 1


@pytest.mark.parametrize("case", cases("rloo"), ids=lambda case: case["name"])
def test_rloo_weighs_whole_completions(case: dict[str, Any]) -> None:
    policy = model("policy")
    found = loss_of("rloo", case["args"], batch(case, "old"), policy)
    assert found.loss == pytest.approx(case["loss_off_policy"], rel=1e-4)
    assert norm(policy) == pytest.approx(case["grad_l2"], rel=1e-3)


@pytest.mark.parametrize(
    ("objective", "case"),
    [(name, case) for name in ("grpo", "rloo") for case in cases(name) if off_policy(case)],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_recorded_log_probabilities_alone_give_the_same_losses(objective: str, case: dict[str, Any]) -> None:
    data = recorded("grpo")
    found = loss_from_token_log_probs(
        objective,
        case["args"],
        data["policy_token_logps"],
        case["advantages"],
        old=data["old_token_logps"],
        mask=data["completion_mask"],
    )
    assert found.loss == pytest.approx(case["loss_off_policy"], rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "case"),
    [(name, case) for name in ("grpo", "rloo") for case in cases(name)],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_advantages_are_those_recorded(objective: str, case: dict[str, Any]) -> None:
    data = recorded("grpo")
    made: Any = built(objective, {**case["args"], "num_generations": data["num_generations"]})
    rewards = np.array(data["rewards"]).reshape(-1, data["num_generations"])
    found = np.concatenate(made.advantages(list(rewards)))
    assert found.tolist() == pytest.approx(case["advantages"], rel=1e-6, abs=1e-7)


def kl_of(settings: dict[str, Any]) -> float:
    case = cases("grpo")[0]
    settings = {"loss_type": "grpo", "beta": 0.04, **settings}
    return loss_of("grpo", settings, batch(case, "old", "reference"), model("policy"), model("reference")).loss


def test_the_kl_is_weighed_by_the_ratio_or_not() -> None:
    """Numbers of TRL 1.16 with its default beta of then, on the same completions."""
    assert kl_of({}) == pytest.approx(0.032437, abs=1e-6)
    assert kl_of({"use_bias_correction_kl": False}) == pytest.approx(0.031881, abs=1e-6)


def test_rewards_in_the_place_of_advantages_are_compared_within_their_group() -> None:
    data, case = recorded("grpo"), cases("grpo")[0]
    given = batch(None, "old") | {"rewards": data["rewards"]}

    def loss() -> Recorded:
        return loss_of("grpo", {**case["args"], "num_generations": 4}, given, model("policy"))

    assert loss().loss == pytest.approx(case["loss_off_policy"], rel=1e-4)


@pytest.mark.parametrize("truth", [True, False])
def test_scaling_may_be_said_by_a_truth(truth: bool) -> None:
    made: Any = built("grpo", {"scale_rewards": truth})
    assert made.settings.divisor == ("group" if truth else "none")


def test_a_setting_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match="quantile"):
        loss_of("grpo", {"top_entropy_quantile": 0.2}, batch(cases("grpo")[0]), model("policy"))
