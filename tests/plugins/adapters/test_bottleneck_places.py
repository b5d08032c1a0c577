"""Where bottleneck adapters are put in the blocks of many families, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loomtune.errors import UserError
from loomtune_plugins.adapters.bottleneck import places as bottleneck_places
from loomtune_plugins.adapters.bottleneck.bottleneck import Bottleneck
from loomtune_plugins.adapters.bottleneck.settings import BottleneckSettings

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
FALCON = {"num_kv_heads": 4, "bias": False, "head_dim": None}

FAMILIES: dict[str, tuple[dict[str, object], str, str]] = {
    "llama": ({}, "self_attn", "mlp"),
    "mistral": ({}, "self_attn", "mlp"),
    "qwen2": ({}, "self_attn", "mlp"),
    "qwen3": ({}, "self_attn", "mlp"),
    "phi": ({"resid_pdrop": 0.0}, "self_attn", "mlp"),
    "phi3": ({}, "self_attn", "mlp"),
    "gemma": ({}, "self_attn", "mlp"),
    "gemma2": ({}, "self_attn", "mlp"),
    "gemma3_text": ({}, "self_attn", "mlp"),
    "olmo2": ({}, "self_attn", "mlp"),
    "gpt2": ({"n_inner": 24}, "attn", "mlp"),
    "gptj": ({"rotary_dim": 4}, "attn", "mlp"),
    "gpt_neox": ({"use_parallel_residual": True}, "attention", "mlp"),
    "gpt_neox one after the other": ({"use_parallel_residual": False}, "attention", "mlp"),
    "falcon": ({**FALCON, "parallel_attn": True}, "self_attention", "mlp"),
    "falcon one after the other": ({**FALCON, "parallel_attn": False}, "self_attention", "mlp"),
    "falcon new": ({**FALCON, "new_decoder_architecture": True}, "self_attention", "mlp"),
    "opt": (OPT, "self_attn", "fc2"),
    "mixtral": (EXPERTS, "self_attn", "mlp"),
    "qwen3_moe": (EXPERTS, "self_attn", "mlp"),
    "gpt_oss": (EXPERTS, "self_attn", "mlp"),
}


def built(name: str, **more):
    torch.manual_seed(0)
    given = {key: value for key, value in {**SMALL, **more}.items() if value is not None}
    config = AutoConfig.for_model(name.split(maxsplit=1)[0], **given)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_places_are_the_sublayers_outputs_before_they_are_added(family: str) -> None:
    more, attention, mlp = FAMILIES[family]
    model = built(family, **more)
    for block in bottleneck_places.blocks(model):
        one, other = bottleneck_places.places(block, "houlsby")
        assert (one.after, other.after) == (block.get_submodule(attention), block.get_submodule(mlp))
        (end,) = bottleneck_places.places(block, "pfeiffer")
        assert one.owner is other.owner is end.owner is end.after is block
        # If nothing but what both places give were added to the stream, without them a block would change nothing.
        one.after.register_forward_hook(nothing)
        other.after.register_forward_hook(nothing)
        block.register_forward_hook(unchanged, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 7)[None], use_cache=False)
    assert all(block.checked for block in bottleneck_places.blocks(model))


def nothing(module, args, output):
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def unchanged(block, args, given, output) -> None:
    x = args[0] if args else given["hidden_states"]
    torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, x, atol=1e-6, rtol=1e-6)
    block.checked = True


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_is_called_once_with_the_stream_and_changes_it(family: str, variant: str) -> None:
    model = built(family, **FAMILIES[family][0])
    tokens = torch.arange(1, 7)[None]
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
    adapter = Bottleneck(BottleneckSettings(variant=variant, size=2))
    module, source = adapter.weave(model, _Base(), 0)
    calls: dict[str, int] = {}
    for name, part in module.named_modules():
        if "bottleneck" in name.rpartition(".")[2]:
            part.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    with torch.no_grad():
        for name in source.shapes():
            module.get_parameter(name).copy_(source.read(name))
        assert torch.equal(module(input_ids=tokens, use_cache=False).logits, before)
        # Each shifts one channel: a shift of all would be lost in a norm.
        for name in source.shapes():
            if name.endswith("up.bias"):
                module.get_parameter(name)[0] = 1.0
        assert not torch.allclose(module(input_ids=tokens, use_cache=False).logits, before, atol=1e-4)
    assert len(calls) == len(source.shapes()) / 4 == (4 if variant == "houlsby" else 2)
    assert set(calls.values()) == {2}


class _Base:
    def shapes(self):
        return {}


def test_a_block_that_norms_its_sum_takes_houlsby_alone() -> None:
    for name, more in (("opt", OPT | {"do_layer_norm_before": False}), ("openai-gpt", {})):
        block = bottleneck_places.blocks(built(name, **more))[0]
        assert len(bottleneck_places.places(block, "houlsby")) == 2
        with pytest.raises(UserError, match=r"(?s)ends in a norm.*set adapter.variant=houlsby"):
            bottleneck_places.places(block, "pfeiffer")


def test_outputs_in_a_list_are_adapted_too() -> None:
    model, tokens = built("openai-gpt"), torch.arange(1, 7)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        module, source = Bottleneck(BottleneckSettings(size=2)).weave(model, _Base(), 0)
        for name in source.shapes():
            module.get_parameter(name).fill_(0.5)
            module.get_parameter(name).view(-1)[0] = 1.0
        assert not torch.allclose(module(input_ids=tokens).logits, before, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("bloom", {"n_layer": 2}, "BloomAttention adds to the stream within itself"),
        ("mpt", {"d_model": 16, "n_heads": 4, "n_layers": 2}, "MptMLP adds to the stream within itself"),
        ("qwen3_next", {"num_experts": 0}, r"linear_attn \(Qwen3NextGatedDeltaNet\)"),
        ("granitemoeshared", {**EXPERTS, "shared_intermediate_size": 8}, r"shared_mlp \(GraniteMoeSharedMLP\)"),
        ("bert", {"is_decoder": True}, r"intermediate \(BertIntermediate\)"),
    ],
)
def test_blocks_that_are_not_understood_are_refused_by_what_they_hold(family: str, more: dict, said: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **more}))
    with pytest.raises(UserError, match=said) as caught:
        Bottleneck(BottleneckSettings(size=2)).weave(model, _Base(), 0)
    assert "choose adapter=lora" in str(caught.value)


def test_cross_attention_is_refused() -> None:
    block = bottleneck_places.blocks(built("gpt2", n_inner=24, add_cross_attention=True))[0]
    with pytest.raises(UserError, match=r"crossattention \(GPT2Attention\)"):
        bottleneck_places.places(block, "pfeiffer")


def test_a_list_of_experts_longer_than_the_list_of_blocks_is_not_taken_for_it() -> None:
    inner = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(inner), "other": nn.ModuleList([nn.Linear(2, 2)])})
    assert bottleneck_places.blocks(model) is model["layers"]
    with pytest.raises(UserError, match="has no list of blocks"):
        bottleneck_places.blocks(nn.Linear(2, 2))


def test_a_model_that_does_not_say_how_wide_it_is_is_refused() -> None:
    with pytest.raises(UserError, match="does not say how wide"):
        bottleneck_places.width(nn.Linear(2, 2))


def test_a_sublayer_whose_weights_are_packed_into_buffers_is_still_one() -> None:
    model = built("llama")
    block = bottleneck_places.blocks(model)[0]
    for layer in [part for part in block.mlp.modules() if isinstance(part, nn.Linear)]:
        layer.register_buffer("packed", layer.weight.detach())
        del layer.weight
    assert bottleneck_places.places(block, "houlsby")[1].after is block.mlp


def test_a_block_with_something_more_that_learns_is_refused() -> None:
    block = bottleneck_places.blocks(built("llama"))[0]
    block.add_module("per_layer_input", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"per_layer_input \(Linear\)"):
        bottleneck_places.places(block, "houlsby")
