"""Every variant of LoRA against peft on a loaded model, and what leaves against what was trained."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapter_fakes import logits, streamed, train
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.settings import LoraSettings

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Variant:
    """Settings of ours, what peft is told, and the model."""

    ours: dict[str, Any]
    peft: dict[str, Any] = field(default_factory=dict)
    tied: bool = False

    @property
    def adapter(self) -> Lora:
        return Lora(LoraSettings(**{"rank": 4, "alpha": 8, **self.ours}))

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **self.peft})


VARIANTS = {
    "plain": Variant({}),
    "gaussian": Variant({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "orthogonal": Variant({"init": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
    "modules": Variant({"modules": ["lm_head", "*norm"]}, {"modules_to_save": ["lm_head", "norm"]}),
    "norms": Variant({"modules": ["model.norm"]}, {"modules_to_save": ["model.norm"]}),
    "tokens": Variant({"tokens": [3, 7, 45]}, {"trainable_token_indices": [3, 7, 45]}),
    "tied tokens": Variant({"tokens": [3, 7, 45]}, {"trainable_token_indices": [3, 7, 45]}, tied=True),
    "dora, tokens and a head": Variant(
        {"dora": True, "tokens": [5, 10], "modules": ["lm_head"]},
        {"use_dora": True, "trainable_token_indices": [5, 10], "modules_to_save": ["lm_head"]},
    ),
    "pissa": Variant({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa, rslora": Variant(
        {"init": "pissa", "rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}
    ),
    "pissa, dora": Variant({"init": "pissa", "dora": True}, {"init_lora_weights": "pissa", "use_dora": True}),
    "quick pissa": Variant({"init": "pissa_niter_16"}, {"init_lora_weights": "pissa_niter_16"}),
    "olora": Variant({"init": "olora"}, {"init_lora_weights": "olora"}),
}  # fmt: skip


QUICK = ("modules", "dora, tokens and a head", "tied tokens", "pissa, dora")


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def variant(request) -> Variant:
    return VARIANTS[request.param]


def by_peft(variant: Variant, model: Any, source: Any) -> PeftModel:
    """peft's own weaving of the loaded model, with our first values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), variant.config)
    drawn = "niter" in variant.ours.get("init", "")  # peft draws other directions, and takes others out of the base
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if drawn or parameter.requires_grad:
                parameter.copy_(source.read(name))
    return theirs


def test_loss_gradients_and_merge_are_those_of_peft(variant, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(variant.tied), variant.adapter
    module, source = bring_to_life(adapter, model)
    theirs = by_peft(variant, model, source)
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    peft = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert found.keys() == peft.keys()
    losses = [each(input_ids=tokens, labels=tokens).loss for each in (module, theirs)]
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=2e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, peft[name].grad, atol=2e-5, rtol=1e-3)
    ours = dict(adapter.merged(streamed(module)))
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert ours.keys() == merged.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, merged[name].detach(), atol=2e-5, rtol=1e-4)


def test_it_starts_as_the_base_and_is_it_when_off(variant, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(variant.tied), variant.adapter
    module, _ = bring_to_life(adapter, model)
    torch.testing.assert_close(logits(module, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)
    train(module, tokens, lr=0.1)
    assert not torch.allclose(logits(module, tokens), logits(model, tokens), atol=5e-4)
    with adapter.off(module):
        torch.testing.assert_close(logits(module, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)


def test_what_leaves_says_what_was_trained_on_the_base_as_it_was(
    variant, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, adapter = llama(variant.tied), variant.adapter
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, lr=0.1)
    said = logits(module, tokens)
    adapter.save(tmp_path, streamed(module), "some/base")
    opened = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(opened, tokens), said, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(opened.merge_and_unload(), tokens), said, atol=2e-4, rtol=1e-4)
    ours = dict(adapter.merged(streamed(module)))
    assert ours.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(ours, strict=False)
    torch.testing.assert_close(logits(model, tokens), said, atol=2e-4, rtol=1e-4)


def test_the_source_knows_the_module_and_slices_are_those_of_the_whole(variant, llama, bring_to_life) -> None:
    module, source = bring_to_life(variant.adapter, llama(variant.tied))
    again = bring_to_life(variant.adapter, llama(variant.tied))[1]
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in source.shapes().items():
        half, whole = shape[0] // 2, source.read(name)
        parts = [source.read(name, (slice(0, half),)), source.read(name, (slice(half, None),))]
        assert torch.equal(torch.cat(parts), whole), name
        assert torch.equal(again.read(name), whole), name


def test_training_leaves_the_base_to_the_bit(variant, llama, bring_to_life, tokens) -> None:
    module, source = bring_to_life(variant.adapter, llama(variant.tied))
    train(module, tokens, lr=0.1)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.detach(), source.read(name)) != parameter.requires_grad, name
