"""Bottleneck adapters: what is added and computed, where it starts, how it is switched off, saved and opened again."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune_plugins.adapters import adapters
from loomtune_plugins.adapters.bottleneck.bottleneck import Bottleneck, attach
from loomtune_plugins.adapters.bottleneck.settings import BottleneckSettings

VARIANTS = [
    BottleneckSettings(reduction=4),
    BottleneckSettings(variant="pfeiffer", size=3, activation="relu", scaling=0.5),
]

FUNCTIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


@pytest.fixture(params=VARIANTS, ids=["houlsby", "pfeiffer"])
def settings(request) -> BottleneckSettings:
    return request.param


def moved(module, std: float = 0.3):
    """The module as training might leave it: what was added is far from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def logits(module, tokens):
    with torch.no_grad():
        return module(input_ids=tokens, use_cache=False).logits


def streamed(module):
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())


def plain(model, added, settings, tokens):
    """Logits of a Llama by hand, with adapters in it. added: their tensors by name."""

    def adapter(block, place, x):
        if (key := f"model.layers.{block}.bottleneck_{place}.") + "up.bias" not in added:
            return 0
        inner = FUNCTIONS[settings.activation or "gelu"](x @ added[key + "down.weight"].T + added[key + "down.bias"])
        return (settings.scaling or 1) * (inner @ added[key + "up.weight"].T + added[key + "up.bias"])

    x = model.model.embed_tokens(tokens)
    angles = model.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    for i, block in enumerate(model.model.layers):
        given = block.input_layernorm(x)
        sublayer = block.self_attn(hidden_states=given, position_embeddings=angles, attention_mask=None)[0]
        x = x + sublayer + adapter(i, "attention", sublayer)
        sublayer = block.mlp(block.post_attention_layernorm(x))
        x = x + sublayer + adapter(i, "mlp", sublayer)
        x = x + adapter(i, "block", x)
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("layers", [[], ["1"]])
def test_it_computes_the_formula_of_its_paper(activation, variant, layers, llama, bring_to_life, tokens) -> None:
    settings = BottleneckSettings(variant=variant, size=5, activation=activation, scaling=0.7, layers=layers)
    model = llama()
    module = moved(bring_to_life(Bottleneck(settings), model)[0])
    added = {name: tensor.detach() for name, tensor in module.named_parameters() if tensor.requires_grad}
    assert len(added) == 4 * (2 if variant == "houlsby" else 1) * (1 if layers else 2)
    with torch.no_grad():
        expected = plain(model, added, settings, tokens)
    torch.testing.assert_close(logits(module, tokens), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(model, tokens)).abs().max() > 1e-2


def test_gradients_reach_the_adapter_alone_and_the_base_stays(settings, llama, bring_to_life, tokens) -> None:
    model = llama()
    adapter = Bottleneck(settings)
    module, _ = bring_to_life(adapter, model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(3):
        module(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == (adapter.base_name(name) is None) == parameter.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
    before = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        if (known := adapter.base_name(name)) is not None:
            assert torch.equal(parameter, before[known]), name
        else:
            assert parameter.abs().max() > 1e-2, name


def test_gradients_are_those_of_the_formula_also_where_activations_are_recomputed(
    settings, llama, bring_to_life, tokens
) -> None:
    model, found = llama(), []
    for recompute in (False, True):
        module = moved(bring_to_life(Bottleneck(settings), model)[0])
        if recompute:
            for block in module.model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        output = module(input_ids=tokens, use_cache=False).logits
        F.cross_entropy(output.flatten(0, 1), tokens.flatten()).backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    leaves = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    F.cross_entropy(plain(model, leaves, settings, tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, leaf in leaves.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], leaf.grad, atol=1e-6, rtol=1e-4)


def test_a_woven_model_starts_as_its_base_to_the_bit(settings, llama, bring_to_life, tokens) -> None:
    model = llama()
    module, _ = bring_to_life(Bottleneck(settings), model)
    assert torch.equal(logits(module, tokens), logits(model, tokens))


def test_off_gives_the_base_bit_for_bit_and_leaves_no_trace(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Bottleneck(settings)
    module = moved(bring_to_life(adapter, model)[0])
    trained = logits(module, tokens)
    with adapter.off(module):
        assert torch.equal(logits(module, tokens), logits(model, tokens))
    assert torch.equal(logits(module, tokens), trained)
    assert not torch.equal(trained, logits(model, tokens))
    with pytest.raises(ValueError, match="inside"), adapter.off(module):
        raise ValueError("inside")
    assert torch.equal(logits(module, tokens), trained)


def test_the_source_knows_exactly_the_names_and_shapes_of_the_module(settings, llama, bring_to_life) -> None:
    model = llama()
    module, source = bring_to_life(Bottleneck(settings), model)
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    added = source.shapes().keys() - dict(model.named_parameters()).keys()
    sizes = {source.shapes()[name] for name in added if name.endswith("down.weight")}
    assert sizes == {(4, 16) if settings.reduction else (3, 16)}


def test_slices_of_first_values_are_those_of_the_whole(settings, llama, bring_to_life) -> None:
    _, source = bring_to_life(Bottleneck(settings), llama())
    for name, shape in source.shapes().items():
        half = shape[0] // 2
        parts = [source.read(name, (slice(0, half),)), source.read(name, (slice(half, None),))]
        assert torch.equal(torch.cat(parts), source.read(name)), name


def test_first_values_depend_on_seed_and_name_and_draw_from_no_global_state(llama, bring_to_life) -> None:
    def drawn(seed):
        return bring_to_life(Bottleneck(BottleneckSettings(size=64)), llama(), seed)[1]

    places = [f"model.layers.{i}.bottleneck_{place}" for i in range(2) for place in ("attention", "mlp")]
    one, other, state = drawn(7), drawn(8), torch.get_rng_state()
    values = [one.read(f"{place}.down.weight") for place in places]
    assert torch.equal(torch.get_rng_state(), state)
    for place, value in zip(places, values, strict=True):
        assert torch.equal(drawn(7).read(f"{place}.down.weight"), value)
        assert not torch.equal(other.read(f"{place}.down.weight"), value)
        assert not any(one.read(f"{place}.{leaf}").any() for leaf in ("down.bias", "up.weight", "up.bias"))
    assert len({tuple(value.flatten().tolist()) for value in values}) == 4
    # A normal of deviation 0.01, cut at two deviations, has one of 0.0088.
    every = torch.stack(values)
    assert every.abs().max() <= 2e-2 and every.mean().abs() < 5e-4
    assert every.std().item() == pytest.approx(0.0088, rel=0.03)


def test_the_module_on_the_meta_device_draws_nothing(llama) -> None:
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(llama().config)
    state = torch.get_rng_state()
    module, _ = Bottleneck(VARIANTS[0]).weave(skeleton, _Nothing(), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_dropout_falls_on_what_is_added_and_in_training_alone(llama, bring_to_life, tokens) -> None:
    module = moved(bring_to_life(Bottleneck(BottleneckSettings(dropout=0.5)), llama())[0])
    part = module.model.layers[0].bottleneck_mlp
    x = torch.ones(1, 200, 16)
    with torch.no_grad():
        whole, dropped = part.eval()(x) - x, part.train()(x) - x
    ratio = dropped / whole
    kept = (ratio - 2).abs() < 1e-3
    assert torch.equal(kept, ~(ratio.abs() < 1e-3))
    assert 0.4 < kept.float().mean() < 0.6


def test_a_saved_adapter_attaches_to_a_plain_model_and_generates(
    settings, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, adapter = llama(), Bottleneck(settings)
    module = moved(bring_to_life(adapter, model)[0])
    adapter.save(tmp_path / "adapter", streamed(module), "some/base")
    before, state = logits(model, tokens), torch.get_rng_state()
    opened = attach(model.eval(), tmp_path / "adapter")
    assert opened is model and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(opened, tokens), logits(module, tokens))
    assert not torch.equal(logits(opened, tokens), before)
    ask = partial(opened.generate, tokens[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ask(use_cache=True), ask(use_cache=False))


def test_an_attached_adapter_computes_in_fp32_on_a_base_in_bf16(
    settings, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, adapter = llama(), Bottleneck(settings)
    adapter.save(tmp_path, streamed(moved(bring_to_life(adapter, model)[0], 0.1)), "base")
    whole = logits(attach(llama(), tmp_path), tokens)
    low = attach(model.bfloat16(), tmp_path)
    assert {p.dtype for name, p in low.named_parameters() if "bottleneck" in name} == {torch.float32}
    found = logits(low, tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), whole, atol=0.3, rtol=0.1)


def test_the_file_says_what_the_tensors_are(llama, bring_to_life, tmp_path) -> None:
    settings = BottleneckSettings(variant="pfeiffer", size=3, scaling=2.0, layers=["1"], dropout=0.1)
    module = moved(bring_to_life(Bottleneck(settings), llama())[0])
    # Who saves need not be who wove.
    Bottleneck(settings).save(tmp_path, streamed(module), "some/base")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    place = "model.layers.1.bottleneck_block"
    assert written == {
        "format": "loomtune-bottleneck",
        "version": 1,
        "variant": "pfeiffer",
        "activation": "gelu",
        "scaling": 2.0,
        "dropout": 0.1,
        "width": 16,
        "size": 3,
        "layers": [1],
        "base_model_name_or_path": "some/base",
        "shapes": {
            f"{place}.down.bias": [3],
            f"{place}.down.weight": [3, 16],
            f"{place}.up.bias": [16],
            f"{place}.up.weight": [16, 3],
        },
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == written["shapes"].keys()
    assert all(torch.equal(tensor, module.get_parameter(name)) for name, tensor in tensors.items())


def test_training_goes_on_from_a_saved_adapter(settings, llama, bring_to_life, tokens, tmp_path) -> None:
    model, first = llama(), Bottleneck(settings)
    module = moved(bring_to_life(first, model)[0])
    first.save(tmp_path / "one", streamed(module), "base")
    second = Bottleneck(BottleneckSettings(path=str(tmp_path / "one")))
    again, source = bring_to_life(second, model)
    assert torch.equal(logits(again, tokens), logits(module, tokens))
    assert all(p.requires_grad == ("bottleneck" in name) for name, p in again.named_parameters())
    name = next(name for name in source.shapes() if name.endswith("up.weight"))
    assert torch.equal(source.read(name, (slice(1, 5), slice(0, 2))), module.get_parameter(name)[1:5, 0:2])
    (tmp_path / "one").rename(tmp_path / "moved")  # nobody needs it any more
    second.save(tmp_path / "two", streamed(again), "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "moved" / file).read_bytes()


def test_settings_that_contradict_a_saved_adapter_are_all_refused(llama, bring_to_life, tmp_path) -> None:
    adapter = Bottleneck(BottleneckSettings(size=4, activation="relu"))
    adapter.save(tmp_path, streamed(bring_to_life(adapter, llama())[0]), "base")
    same = BottleneckSettings(path=str(tmp_path), variant="houlsby", reduction=4, activation="relu", dropout=0.1)
    bring_to_life(Bottleneck(same), llama())
    wrong = {"variant": "pfeiffer", "activation": "gelu", "scaling": 3.0, "layers": ["0"]}
    for size in ({"size": 5}, {"reduction": 2}):
        with pytest.raises(UserError) as caught:
            bring_to_life(Bottleneck(BottleneckSettings(path=str(tmp_path), **wrong, **size)), llama())
        assert {fault.cure for fault in caught.value.faults} == {f"leave adapter.{key} out" for key in wrong | size}


def test_a_saved_adapter_of_another_model_is_refused(llama, bring_to_life, tmp_path) -> None:
    adapter = Bottleneck(BottleneckSettings(size=4))
    adapter.save(tmp_path, streamed(bring_to_life(adapter, llama())[0]), "base")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    longer = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in saved.items()}
    write(tmp_path, config | {"layers": [0, 2]}, longer)
    for opens in (lambda: attach(llama(), tmp_path), lambda: started(tmp_path, llama, bring_to_life)):
        with pytest.raises(UserError, match=r"(?s)for block 2, and the model has 2.*set model.path"):
            opens()
    wider = {name: torch.zeros(*shape[:-1], shape[-1] + 1) for name, shape in config["shapes"].items()}
    write(tmp_path, config, wider)
    for opens in (lambda: attach(llama(), tmp_path), lambda: started(tmp_path, llama, bring_to_life)):
        with pytest.raises(UserError, match=r"(?s)does not fit the model: .*\(5,\) there and \(4,\) in the model"):
            opens()


def test_what_is_no_saved_adapter_is_refused_with_what_it_is(llama, bring_to_life, tmp_path) -> None:
    adapter = Bottleneck(BottleneckSettings(size=4))
    adapter.save(tmp_path, streamed(bring_to_life(adapter, llama())[0]), "base")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for wrong, said in (
        ({"peft_type": "LORA"}, r"an adapter of peft \(LORA\)"),
        ({}, "holds no bottleneck adapter"),
        ([1], "holds no bottleneck adapter"),
        (config | {"version": 2}, "version 2 of the format"),
        (config | {"activation": "mish"}, "values that no bottleneck adapter has"),
        (config | {"scaling": "much"}, "values that no bottleneck adapter has"),
        (config | {"layers": [-1]}, "values that no bottleneck adapter has"),
        (config | {"shapes": {}}, "belongs to other weights"),
    ):
        write(tmp_path, wrong, saved)
        with pytest.raises(UserError, match=said) as caught:
            started(tmp_path, llama, bring_to_life)
        assert "set adapter.path" in str(caught.value)
    with pytest.raises(UserError, match="holds no saved adapter"):
        attach(llama(), tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="holds no saved adapter"):
        attach(llama(), tmp_path)


def write(folder, config, tensors) -> None:
    if isinstance(config, dict) and config.get("shapes"):
        config = config | {"shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def started(folder, llama, bring_to_life):
    return bring_to_life(Bottleneck(BottleneckSettings(path=str(folder))), llama())


def test_two_adapters_on_one_model_are_refused(llama, bring_to_life, tmp_path) -> None:
    adapter = Bottleneck(VARIANTS[0])
    module, _ = bring_to_life(adapter, llama())
    adapter.save(tmp_path, streamed(module), "base")
    with pytest.raises(UserError, match="has a bottleneck adapter already"):
        attach(module, tmp_path)


def test_it_cannot_be_merged_and_says_how_it_leaves(settings, llama, bring_to_life) -> None:
    adapter = Bottleneck(settings)
    module, _ = bring_to_life(adapter, llama())
    with pytest.raises(UserError, match=r"(?s)not linear.*cure:.*`loomtune export RUN --to adapter`"):
        list(adapter.merged(streamed(module)))


def test_the_base_keeps_its_names(settings, llama, bring_to_life) -> None:
    model, adapter = llama(), Bottleneck(settings)
    module, _ = bring_to_life(adapter, model)
    names = [adapter.base_name(name) for name, _ in module.named_parameters()]
    assert [name for name in names if name] == [name for name, _ in model.named_parameters()]
    assert names.count(None) == sum(parameter.requires_grad for parameter in module.parameters()) > 0
    assert adapter.base(module) is module
    assert adapter.learning_rate_scale("model.layers.0.bottleneck_mlp.up.weight") == 1


def test_layers_are_chosen_by_number_and_a_pattern_without_any_is_named() -> None:
    def adapted(layers):
        config = LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=5, num_attention_heads=4
        )
        with torch.device("meta"):
            skeleton = LlamaForCausalLM(config)
        source = Bottleneck(BottleneckSettings(layers=layers)).weave(skeleton, _Nothing(), 0)[1]
        return sorted({int(name.split(".")[2]) for name in source.shapes()})

    assert adapted([]) == [0, 1, 2, 3, 4]
    assert adapted(["1-3"]) == [1, 2, 3]
    assert adapted(["0", "3-4"]) == [0, 3, 4]
    with pytest.raises(UserError, match=r"adapter.layers names '7', which matches no block"):
        adapted(["7", "0"])


def test_settings_without_sense_are_refused_all_at_once(llama, bring_to_life) -> None:
    wrong = {"variant": "parallel", "reduction": -1, "size": -2, "activation": "mish", "dropout": 1.0, "scaling": -1.0}
    with pytest.raises(UserError) as caught:
        Bottleneck(BottleneckSettings(**wrong))
    assert [fault.what.split("=")[0] for fault in caught.value.faults][:6] == [f"adapter.{key}" for key in wrong]
    with pytest.raises(UserError, match=r"adapter\.size and adapter\.reduction both"):
        Bottleneck(BottleneckSettings(size=4, reduction=4))
    with pytest.raises(UserError, match=r"(?s)adapter.reduction=17 leaves nothing.*width 16.*at most 16"):
        bring_to_life(Bottleneck(BottleneckSettings(reduction=17)), llama())


def test_it_offers_itself_as_one_that_can_be_switched_off_but_not_merged() -> None:
    (offer,) = [offer for offer in adapters() if offer.name == "bottleneck"]
    assert offer.provides == {Trait.ADAPTER_OFF, Trait.WRAPPED_LINEARS, Trait.UNMERGEABLE}


class _Nothing:
    def shapes(self):
        return {}


def test_the_fingerprint_is_that_of_the_files_gone_on_from(settings, llama, bring_to_life, tmp_path) -> None:
    def of() -> str:
        return Bottleneck(BottleneckSettings(path=str(tmp_path))).fingerprint()

    assert Bottleneck(settings).fingerprint() == ""
    adapter = Bottleneck(settings)
    module, _ = bring_to_life(adapter, llama())
    adapter.save(tmp_path, streamed(moved(module)), "base")
    first = of()
    assert len(first) == 64 and of() == first
    adapter.save(tmp_path, streamed(moved(module, std=0.2)), "base")
    second = of()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"scaling": 0.25}))
    assert len({first, second, of()}) == 3
