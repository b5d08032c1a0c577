"""Prefix tuning: keys and values before those of each sample."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune_plugins.adapters.rules import preflight
from loomtune_plugins.adapters.virtual import prefix_cache
from loomtune_plugins.adapters.virtual.prefix import Prefix
from loomtune_plugins.adapters.virtual.settings import PrefixSettings


def test_a_block_can_be_computed_again_with_the_same_cache() -> None:
    torch.manual_seed(0)
    keys, values, new = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 5, 4)
    cache = prefix_cache.held([(keys, values)])
    for _ in range(2):
        joined, with_values = cache.update(new, new + 1, 0)
        assert torch.equal(joined, torch.cat([keys, new], 2))
        assert torch.equal(with_values, torch.cat([values, new + 1], 2))
        assert cache.get_seq_length() == 3


def test_what_is_joined_has_the_type_of_what_the_model_computes() -> None:
    cache = prefix_cache.held([(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))])
    keys, values = cache.update(torch.ones(1, 1, 3, 4).bfloat16(), torch.ones(1, 1, 3, 4).bfloat16(), 0)
    assert keys.dtype == values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mask", "free"),
    [
        (torch.ones(2, 3, dtype=torch.long), 1),
        (torch.full((2, 1, 3, 3), torch.finfo().min), 0.0),
        (torch.zeros(2, 1, 3, 3, dtype=torch.bool), True),
    ],
    ids=["ones", "to add", "bools"],
)
def test_everyone_sees_the_prefix_whatever_the_mask_is_made_of(mask, free) -> None:
    wide = prefix_cache.widened({"attention_mask": mask, "more": 1}, 2)
    assert wide["more"] == 1
    assert torch.equal(wide["attention_mask"][..., 2:], mask)
    assert (wide["attention_mask"][..., :2] == free).all()
    assert wide["attention_mask"].dtype == mask.dtype


def test_eager_attention_computes_the_same(llama, bring_to_life, tokens) -> None:
    adapter, found = Prefix(PrefixSettings(length=3)), []
    for attention in ("sdpa", "eager"):
        module, _ = bring_to_life(adapter, llama(attn_implementation=attention))
        found.append(adapter.base(module)(input_ids=tokens).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_zeros_come_from_the_last_layer_alone(projection, llama, bring_to_life) -> None:
    settings = PrefixSettings(length=3, init="zero", projection=projection)
    module, _ = bring_to_life(Prefix(settings), llama())
    assert not module.made(torch.device("cpu")).any()
    assert any(parameter.any() for parameter in module.encoder.parameters()) == projection


def test_shapes_are_those_of_shared_key_and_value_heads(llama, bring_to_life, tmp_path) -> None:
    adapter = Prefix(PrefixSettings(length=3))
    module, _ = bring_to_life(adapter, llama())
    assert module.encoder.embedding.weight.shape == (3, 2 * 2 * 2 * 4)  # layers, keys and values, heads, width
    adapter.save(tmp_path, iter(module.named_parameters()), "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    sizes = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 8, "num_virtual_tokens": 3}
    assert sizes.items() <= config.items()
    assert config["inference_mode"] and config["peft_type"] == "PREFIX_TUNING"


def woven(window: int | None) -> nn.Module:
    config = MistralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    with torch.device("meta"):
        return Prefix(PrefixSettings(length=3)).weave(MistralForCausalLM(config), None, 0)[0]


def test_a_sliding_window_is_refused_with_its_reason() -> None:
    with pytest.raises(UserError, match=r"(?s)sliding window of 8 tokens.*adapter=prompt"):
        woven(8)


def test_a_sliding_window_is_refused_before_any_process_exists() -> None:
    config = MistralConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, sliding_window=8)
    model: Any = SimpleNamespace(context=lambda: 64, skeleton=lambda: MistralForCausalLM(config))
    with pytest.raises(UserError, match="sliding window of 8 tokens"):
        Prefix(PrefixSettings(length=3)).suits(model)


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(UserError, match=r"no config of transformers"):
        Prefix(PrefixSettings()).weave(nn.Linear(2, 2), None, 0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (PrefixSettings(init="vocabulary"), "adapter.init=vocabulary is unknown"),
        (PrefixSettings(width=4), "(?s)adapter.width=4.*adapter.projection=true"),
    ],
)
def test_settings_without_sense_are_refused(settings, reason) -> None:
    with pytest.raises(UserError, match=reason):
        Prefix(settings)


@pytest.mark.parametrize(("adapter", "refused"), [("prefix", True), ("prompt", False)])
def test_packing_is_refused_with_a_prefix_and_not_with_virtual_tokens(adapter, refused) -> None:
    plan = compose(["recipe=null", f"adapter={adapter}", "packing=true", "data=jsonl", "data.path=rows.jsonl"])
    found = [finding for finding in preflight(plan, {}) if finding.fatal]
    assert bool(found) is refused
    assert all("packing=true" in one.what and "packing=false" in one.cure for one in found)
