"""QLoRA: what is packed, that it trains as LoRA on the unpacked weights does, and leaves as LoRA on the stored ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loomtune.errors import UserError
from loomtune_plugins.adapters.lora.qlora import Qlora
from loomtune_plugins.adapters.lora.qlora_settings import QloraSettings
from loomtune_plugins.adapters.lora.quantised import QuantisedLinear

pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")

PREFIX = "base_model.model."
VARIANTS = [
    QloraSettings(rank=4, alpha=8),
    QloraSettings(rank=4, alpha=8, quant="fp4", double_quant=False, targets=["q_proj", "v_proj"]),
    QloraSettings(rank=3, alpha=8, dora=True, targets=["q_proj", "mlp.*"]),
    QloraSettings(rank=4, alpha=8, rslora=True, keep=["layers.0.*", "down_proj"]),
]


@pytest.fixture(params=VARIANTS, ids=["nf4", "fp4", "dora", "keep"])
def settings(request) -> QloraSettings:
    return request.param


def packed(module: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantisedLinear)}


def logits(module, tokens):
    with torch.no_grad():
        return module(input_ids=tokens).logits


def streamed(module):
    return ((name, parameter.detach().clone()) for name, parameter in module.named_parameters())


def train(module, tokens, steps: int = 3) -> list[float]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.1), []
    for _ in range(steps):
        loss = module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def unpacked(model, module):
    """The plain model with the matrices that the packed layers compute with."""
    names = {name.removeprefix(PREFIX).removesuffix(".base_layer"): layer for name, layer in packed(module).items()}
    with torch.no_grad():
        for name, layer in names.items():
            model.get_submodule(name).weight.copy_(layer.weight)
    return model


def test_every_linear_layer_but_the_head_is_packed_and_only_what_is_added_is_trained(llama, bring_to_life) -> None:
    module, source = bring_to_life(Qlora(QloraSettings(rank=2, targets=["q_proj"])), llama())
    assert len(packed(module)) == 14 and not any("lm_head" in name for name in packed(module))
    assert source.shapes() == {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.dtype == torch.uint8) == name.endswith(("packed", "scales", "nested")), name


def test_layers_that_are_kept_stay_as_they_are(llama, bring_to_life) -> None:
    module, _ = bring_to_life(Qlora(QloraSettings(rank=2, keep=["layers.0.*", "down_proj"])), llama())
    assert len(packed(module)) == 6
    assert all("layers.1" in name and "down" not in name for name in packed(module))


def test_a_tied_matrix_is_not_packed(llama, bring_to_life) -> None:
    module, _ = bring_to_life(Qlora(QloraSettings(rank=2)), llama(tied=True))
    assert len(packed(module)) == 14
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


def test_a_woven_model_starts_as_its_packed_base_and_off_gives_that_base(
    settings, llama, bring_to_life, tokens
) -> None:
    model, adapter = llama(), Qlora(settings)
    module, _ = bring_to_life(adapter, model)
    stored = logits(model, tokens)
    base = logits(unpacked(model, module), tokens)
    torch.testing.assert_close(logits(module, tokens), base, atol=1e-4, rtol=1e-4)
    assert (stored - base).abs().max() > 1e-2
    train(module, tokens)
    with adapter.off(module):
        assert torch.equal(logits(module, tokens), base)
    assert not torch.allclose(logits(module, tokens), base, atol=1e-3)


def test_it_trains_as_peft_does_on_the_unpacked_base(settings, llama, bring_to_life, tokens) -> None:
    adapter = Qlora(settings)
    module, source = bring_to_life(adapter, llama())
    targets = sorted({added.layer for added in adapter.names.added.values()})
    how = {"use_rslora": bool(settings.rslora), "use_dora": bool(settings.dora)}
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, **how)
    theirs = get_peft_model(unpacked(llama(), module), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(source.read(name))
    ours = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    others = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert ours.keys() == others.keys()
    for one in (module, theirs):
        one(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-5, atol=1e-6)
        parameter.grad = others[name].grad = None
    assert train(module, tokens, 4) == pytest.approx(train(theirs, tokens, 4), rel=1e-5)


def test_evaluation_is_no_other_mode(settings, llama, bring_to_life, tokens) -> None:
    module, _ = bring_to_life(Qlora(settings), llama())
    train(module, tokens)
    assert torch.equal(logits(module.eval(), tokens), logits(module.train(), tokens))


def test_what_was_learned_is_merged_into_the_weights_as_they_are_stored(settings, llama, bring_to_life, tokens) -> None:
    model, adapter = llama(), Qlora(settings)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens)
    learned = {name: tensor for name, tensor in streamed(module) if "lora_" in name}
    exact = adapter.exact()
    plain, source = bring_to_life(exact, model)
    assert {name for name, parameter in plain.named_parameters() if parameter.requires_grad} == learned.keys()
    assert not packed(plain)
    with torch.no_grad():
        for name, tensor in learned.items():
            plain.get_parameter(name).copy_(tensor)
    merged = dict(exact.merged((name, learned.get(name, source.read(name))) for name in source.shapes()))
    untouched = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.load_state_dict(merged)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), atol=1e-4, rtol=1e-4)
    assert torch.equal(merged["model.embed_tokens.weight"], untouched["model.embed_tokens.weight"])


def test_a_saved_adapter_opens_in_plain_peft_on_the_base_as_stored_and_as_packed(
    settings, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, adapter = llama(), Qlora(settings)
    module, _ = bring_to_life(adapter, model)
    train(module, tokens)
    adapter.save(tmp_path, ((n, t) for n, t in streamed(module) if adapter.base_name(n) is None), "some/base")
    learned = {name: tensor for name, tensor in streamed(module) if "lora_" in name}
    on_packed = PeftModel.from_pretrained(unpacked(llama(), module), tmp_path)
    torch.testing.assert_close(logits(on_packed, tokens), logits(module, tokens), atol=1e-4, rtol=1e-4)
    on_stored = PeftModel.from_pretrained(model, tmp_path)
    assert on_stored.peft_config["default"].base_model_name_or_path == "some/base"
    opened = dict(on_stored.named_parameters())
    assert all(torch.equal(opened[name], tensor) for name, tensor in learned.items())


def test_names_of_packed_tensors_belong_to_their_layer_in_the_base(llama, bring_to_life) -> None:
    adapter = Qlora(QloraSettings(rank=2))
    bring_to_life(adapter, llama())
    layer = f"{PREFIX}model.layers.0.self_attn.q_proj"
    for leaf in ("packed", "scales", "nested", "bias"):
        assert adapter.base_name(f"{layer}.base_layer.{leaf}") == f"model.layers.0.self_attn.q_proj.{leaf}"
    assert adapter.base_name(f"{layer}.lora_A.default.weight") is None


def test_a_model_of_which_nothing_would_be_packed_is_refused(llama, bring_to_life) -> None:
    with pytest.raises(UserError, match=r"adapter\.keep=.* leaves no linear layer .*\n.*fewer layers in adapter\.keep"):
        bring_to_life(Qlora(QloraSettings(keep=["*"])), llama())

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(4, 4))

    with pytest.raises(UserError, match="Attending has no linear layer to quantise"):
        Qlora(QloraSettings()).weave(Attending(), None, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"quant": "int4"}, r"adapter\.quant=int4 is none .*\n.*set adapter\.quant to nf4, fp4"),
        ({"block": 48}, r"adapter\.block=48 is none .*\n.*set adapter\.block to 32, 64"),
        ({"rank": 0}, r"adapter\.rank=0"),
        ({"init": "pissa"}, r"adapter\.init=pissa takes .* no exact rest\n.*set adapter\.init to kaiming"),
        ({"init": "olora"}, r"adapter\.init=olora takes"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, said) -> None:
    with pytest.raises(UserError, match=said):
        Qlora(QloraSettings(**wrong))


def test_a_pattern_that_keeps_nothing_is_refused(llama, bring_to_life) -> None:
    with pytest.raises(UserError, match=r"adapter\.keep names 'k_porj'"):
        bring_to_life(Qlora(QloraSettings(keep=["k_porj"])), llama())


def test_a_layer_that_is_trained_whole_is_not_packed(llama, bring_to_life) -> None:
    settings = QloraSettings(rank=2, targets=["q_proj"], modules=["layers.1.mlp.down_proj", "lm_head"])
    module, _ = bring_to_life(Qlora(settings), llama())
    assert len(packed(module)) == 13
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert any("layers.1.mlp.down_proj" in name for name in trained) and any("lm_head" in name for name in trained)
