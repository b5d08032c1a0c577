"""LoRA: what is added, where it starts, how it is switched off, merged and saved."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch
from peft import PeftModel
from torch import nn

from adapter_fakes import InMemory, logits, streamed, train
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune_plugins.adapters import adapters
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.settings import LoraSettings

VARIANTS = [
    LoraSettings(rank=4, alpha=8),
    LoraSettings(rank=4, alpha=8, rslora=True),
    LoraSettings(rank=3, alpha=8, dora=True, targets=["q_proj", "mlp.*"]),
]


@pytest.fixture(params=VARIANTS, ids=["lora", "rslora", "dora"])
def settings(request) -> LoraSettings:
    return request.param


def test_only_the_addition_is_trained(settings, llama, bring_to_life) -> None:
    module, _ = bring_to_life(Lora(settings), llama())
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


def test_a_woven_model_starts_as_its_base(settings, llama, bring_to_life, tokens) -> None:
    model = llama()
    module, _ = bring_to_life(Lora(settings), model)
    torch.testing.assert_close(logits(module, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_the_source_knows_exactly_the_names_and_shapes_of_the_module(settings, llama, bring_to_life) -> None:
    module, source = bring_to_life(Lora(settings), llama())
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_slices_of_first_values_are_those_of_the_whole(settings, llama, bring_to_life) -> None:
    _, source = bring_to_life(Lora(settings), llama())
    for name, shape in source.shapes().items():
        half = shape[0] // 2
        parts = [source.read(name, (slice(0, half),)), source.read(name, (slice(half, None),))]
        assert torch.equal(torch.cat(parts), source.read(name)), name


def test_first_values_depend_on_seed_and_layer_and_draw_from_no_global_state(llama, bring_to_life) -> None:
    def drawn(seed):
        return bring_to_life(Lora(LoraSettings(rank=8)), llama(), seed)[1]

    key, value = (f"base_model.model.model.layers.0.self_attn.{part}_proj.lora_A.default.weight" for part in "kv")
    assert torch.equal(drawn(7).read(key), drawn(7).read(key))
    assert not torch.equal(drawn(7).read(key), drawn(8).read(key))
    assert not torch.equal(drawn(7).read(key), drawn(7).read(value))
    source, state = drawn(7), torch.get_rng_state()
    a = source.read(key)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.8 * 16**-0.5 < a.abs().max() <= 16**-0.5  # uniform in +-1/sqrt(inputs)


def test_off_gives_the_base_bit_for_bit_and_leaves_no_trace(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Lora(settings)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens)
    trained, flags = logits(module, tokens), [parameter.requires_grad for parameter in module.parameters()]
    with adapter.off(module):
        assert torch.equal(logits(module, tokens), logits(model, tokens))
        assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert torch.equal(logits(module, tokens), trained)
    assert not torch.equal(trained, logits(model, tokens))


def test_off_ends_also_where_its_body_fails(llama, bring_to_life, tokens) -> None:
    adapter = Lora(LoraSettings(rank=4))
    module, _ = bring_to_life(adapter, llama())
    train(module, tokens)
    trained = logits(module, tokens)
    with pytest.raises(ValueError, match="inside"), adapter.off(module):
        raise ValueError("inside")
    assert torch.equal(logits(module, tokens), trained)


def test_merged_equals_peft_and_computes_as_the_adapter_does(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Lora(settings)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens)
    before = logits(module, tokens)
    ours = dict(adapter.merged(streamed(module)))
    theirs = dict(module.merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), atol=1e-6, rtol=1e-6)
    model.load_state_dict(ours)
    torch.testing.assert_close(logits(model, tokens), before, atol=1e-5, rtol=1e-5)


class Small(nn.Module):
    """One layer to adapt and one to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.norm = nn.Linear(5, 3), nn.LayerNorm(4, bias=False)
        self.config = {"model_type": "small"}


def woven_small(rank: int) -> Lora:
    adapter = Lora(LoraSettings(rank=rank, alpha=4))
    with torch.device("meta"):
        adapter.weave(Small(), InMemory({}), 0)
    return adapter


def test_merging_takes_tensors_in_any_order_and_keeps_the_type_of_the_base() -> None:
    adapter, layer = woven_small(rank=2), "base_model.model.q_proj"
    torch.manual_seed(0)
    weight, a, b = torch.randn(3, 5).bfloat16(), torch.randn(2, 5), torch.randn(3, 2)
    parts = [
        (f"{layer}.base_layer.weight", weight),
        (f"{layer}.lora_A.default.weight", a),
        (f"{layer}.lora_B.default.weight", b),
        (f"{layer}.base_layer.bias", torch.ones(3)),
        ("base_model.model.norm.weight", torch.ones(4)),
    ]
    for order in permutations(parts):
        ours = dict(adapter.merged(iter(order)))
        assert ours.keys() == {"q_proj.weight", "q_proj.bias", "norm.weight"}
        assert torch.equal(ours["q_proj.weight"], (weight.float() + 2 * b @ a).bfloat16())


def test_merging_refuses_half_an_adapter() -> None:
    half = [("base_model.model.q_proj.base_layer.weight", torch.ones(3, 5))]
    with pytest.raises(AssertionError, match=r"never came.*q_proj"):
        list(woven_small(rank=2).merged(iter(half)))


def test_a_saved_adapter_opens_in_plain_peft(settings, llama, bring_to_life, tokens, tmp_path) -> None:
    model, adapter = llama(), Lora(settings)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens)
    adapter.save(tmp_path / "adapter", streamed(module), "some/base")
    opened = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.equal(logits(opened, tokens), logits(module, tokens))
    assert opened.peft_config["default"].base_model_name_or_path == "some/base"


def test_a_fresh_adapter_can_save_tensors_that_another_wove(settings, llama, bring_to_life, tokens, tmp_path) -> None:
    model = llama()
    module, _ = bring_to_life(Lora(settings), model)
    train(module, tokens)
    ours = ((name, tensor) for name, tensor in streamed(module) if "lora_" in name)
    another = Lora(settings)
    bring_to_life(another, model)
    another.save(tmp_path, ours, "base")
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path), tokens), logits(module, tokens))


def test_a_saved_adapter_names_layers_briefly_where_that_means_the_same(llama, bring_to_life, tmp_path) -> None:
    def saved(targets):
        adapter = Lora(LoraSettings(rank=2, targets=targets))
        module, _ = bring_to_life(adapter, llama())
        adapter.save(tmp_path, streamed(module), "base")
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert saved(["all-linear"]) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert saved(["layers.0.*.q_proj"]) == ["model.layers.0.self_attn.q_proj"]


def test_names_lead_back_to_the_base(settings, llama, bring_to_life) -> None:
    model, adapter = llama(), Lora(settings)
    module, _ = bring_to_life(adapter, model)
    names = [adapter.base_name(name) for name, _ in module.named_parameters()]
    assert [name for name in names if name] == [name for name, _ in model.named_parameters()]
    assert names.count(None) == sum(parameter.requires_grad for parameter in module.parameters())
    assert type(adapter.base(module)) is type(model)


def test_lora_plus_speeds_up_b_alone(llama, bring_to_life) -> None:
    adapter, layer = Lora(LoraSettings(rank=4, plus_ratio=16.0)), "base_model.model.model.layers.0.self_attn.q_proj"
    bring_to_life(adapter, llama())
    assert adapter.learning_rate_scale(f"{layer}.lora_B.default.weight") == 16
    assert adapter.learning_rate_scale(f"{layer}.lora_A.default.weight") == 1
    assert adapter.learning_rate_scale(f"{layer}.base_layer.weight") == 1


def test_all_linear_leaves_out_the_head_and_a_pattern_takes_what_it_matches(llama, bring_to_life) -> None:
    def adapted(targets):
        source = bring_to_life(Lora(LoraSettings(rank=2, targets=targets)), llama())[1]
        return sorted(
            name.split(".lora_A")[0].removeprefix("base_model.model.") for name in source.shapes() if "_A" in name
        )

    everything = adapted(["all-linear"])
    assert len(everything) == 14
    assert not any("lm_head" in name for name in everything)
    assert adapted(["all-linear", "lm_head"]) == ["lm_head", *everything]
    assert adapted(["layers.1.mlp.*_proj"]) == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert adapted(["*.0.*.[qk]_proj"]) == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]


def test_a_tied_embedding_is_left_in_peace(llama, bring_to_life, tokens) -> None:
    model, adapter = llama(tied=True), Lora(LoraSettings(rank=4))
    module, _ = bring_to_life(adapter, model)
    train(module, tokens)
    before, ours = logits(module, tokens), dict(adapter.merged(streamed(module)))
    assert ours.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(ours, strict=False)
    torch.testing.assert_close(logits(model, tokens), before, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"(?s)'lm_head'.*tied to model.embed_tokens.weight.*adapter.targets"):
        bring_to_life(Lora(LoraSettings(rank=4, targets=["lm_head"])), llama(tied=True))


def test_targets_that_match_nothing_are_all_named_with_what_was_meant(llama, bring_to_life) -> None:
    with pytest.raises(UserError) as caught:
        bring_to_life(Lora(LoraSettings(targets=["q_porj", "all-linear", "w3", "embed_tokens"])), llama())
    text = str(caught.value)
    assert "'q_porj', which matches no linear layer. Did you mean 'q_proj'?" in text
    assert len(caught.value.faults) == 3
    assert "'w3'" in text and "'embed_tokens'" in text and "set adapter.targets" in text


def test_a_rank_beyond_a_layer_is_refused(llama, bring_to_life) -> None:
    with pytest.raises(UserError, match=r"(?s)adapter.rank=9.*k_proj' \(16 to 8\).*at most 8"):
        bring_to_life(Lora(LoraSettings(rank=9)), llama())


def test_settings_without_sense_are_refused_all_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Lora(LoraSettings(rank=0, alpha=0, dropout=1.0, plus_ratio=0.0, targets=[]))
    assert [fault.what.split("=")[0] for fault in caught.value.faults] == [
        f"adapter.{key}" for key in ("rank", "alpha", "dropout", "targets", "plus_ratio")
    ]


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="finds no linear layer"):
        Lora(LoraSettings()).weave(torch.nn.Embedding(3, 4), None, 0)


def test_lora_can_be_switched_off_and_full_cannot() -> None:
    found = {offer.name: Trait.ADAPTER_OFF in offer.provides for offer in adapters()}
    assert (found["full"], found["lora"]) == (False, True)
