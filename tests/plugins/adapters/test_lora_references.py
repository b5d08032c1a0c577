"""LoRA, rsLoRA and DoRA against recorded losses and gradients of peft."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.settings import LoraSettings

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared")) / "references"
pytestmark = pytest.mark.skipif(not (SHARED / "peft.json").is_file(), reason=f"no recorded references in {SHARED}")


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((SHARED / "peft.json").read_text())


@pytest.fixture
def policy() -> LlamaForCausalLM:
    config = json.loads((SHARED / "tiny_llama_config.json").read_text())
    config.pop("architecture")
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(load_file(SHARED / "tiny_policy.safetensors"))
    return model


def loss(module) -> torch.Tensor:
    batch = json.loads((SHARED / "sft.json").read_text())["batch"]
    ids, mask, labels = (torch.tensor(batch[key]) for key in ("input_ids", "attention_mask", "labels"))
    logits = module(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", ["lora_r4_a8", "rslora_r4_a8", "dora_r4_a8"])
def test_loss_gradients_and_merge_are_those_recorded(name, recorded, policy, bring_to_life) -> None:
    case = next(case for case in recorded["cases"] if case["name"] == name)
    config = case["config"]
    adapter = Lora(
        LoraSettings(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=config["target_modules"],
            rslora=config["use_rslora"],
            dora=config["use_dora"],
        )
    )
    module, _ = bring_to_life(adapter, policy)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == case["trainable_params"]
    with torch.no_grad():
        for key, parameter in trained.items():
            entry = case["state"][adapter.names.files[key]]
            parameter.copy_(torch.tensor(entry["data"]).reshape(entry["shape"]))

    ours = loss(module)
    ours.backward()
    assert ours.item() == pytest.approx(case["loss"], rel=1e-4)
    for key, norm in case["grad_l2_by_param"].items():
        assert trained[key].grad.norm().item() == pytest.approx(norm, rel=1e-3), key
    total = torch.stack([parameter.grad.norm() for parameter in trained.values()]).norm().item()
    assert total == pytest.approx(case["grad_l2"], rel=1e-3)

    merged = dict(adapter.merged((key, tensor.detach()) for key, tensor in module.named_parameters()))
    policy.load_state_dict(merged)
    with torch.no_grad():
        assert loss(policy).item() == pytest.approx(case["loss_after_merge"], rel=1e-4)
    sample = merged["model.layers.0.self_attn.q_proj.weight"].flatten()[: len(case["merged_q0_sample"])]
    assert sample.tolist() == pytest.approx(case["merged_q0_sample"], rel=1e-5)
