import pytest
import torch
from torch import nn

from loomtune.errors import UserError
from loomtune_plugins.models import architecture, buffers, heads
from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import RandomSettings
from plugins.models.conftest import batch, born, causal, shape


def chosen(words, family: str, **more) -> Random:
    return Random(RandomSettings(shape={**shape(family), **more}, tokenizer=str(words)))


def test_dropout_inside_functions_is_switched_off_and_said(words, capsys):
    architecture.warn.cache_clear()
    network = chosen(words, "llama", attention_dropout=0.1).ghost()
    assert network.config.attention_dropout == 0
    assert "attention_dropout=0.1" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [0.02, 0.0])
def test_a_router_s_loss_that_is_left_out_is_said_once(weight, words, capsys):
    architecture.warn.cache_clear()
    model = chosen(words, "mixtral", router_aux_loss_coef=weight)
    model.ghost(), model.ghost()
    assert capsys.readouterr().err.count("router_aux_loss_coef=0.02 of the model's config is left out") == (weight > 0)


def test_dropout_modules_stay_for_whoever_seeds_them(words):
    network = chosen(words, "gpt2", resid_pdrop=0.2).ghost()
    assert 0.2 in {module.p for module in network.modules() if isinstance(module, nn.Dropout)}
    assert network.config.attn_pdrop == 0


def test_a_functional_dropout_that_no_seed_reaches_is_refused(words):
    plain = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "vocab_size": 300}
    sizes = {"model_type": "opt", "num_hidden_layers": 1, "num_attention_heads": 4, **plain}
    with pytest.raises(UserError, match=r"(?s)applies dropout=0\.1 by a function.*set dropout to 0"):
        Random(RandomSettings(shape={**sizes, "dropout": 0.1}, tokenizer=str(words))).ghost()


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("bloom", "takes no positions"),
        ("mamba", "takes no positions"),
        ("bert", "more than a decoder"),
        ("llama4_text", "chunked_attention layers"),
    ],
)
def test_what_would_train_silently_wrong_is_refused(words, model_type, what):
    extra = {"is_decoder": True} if model_type == "bert" else {}
    sizes = {**shape("llama"), **extra, "model_type": model_type}
    with pytest.raises(UserError, match=what):
        Random(RandomSettings(shape=sizes, tokenizer=str(words))).ghost()


def test_a_family_with_an_unknown_change_of_logits_is_refused(words):
    with pytest.raises(UserError, match="logits_scaling"):
        Random(RandomSettings(shape={**shape("llama"), "logits_scaling": 2.0}, tokenizer=str(words))).ghost()


def test_a_plain_head_is_the_models_own_and_a_scaled_one_keeps_the_names(words):
    plain, capped = chosen(words, "llama").ghost(), chosen(words, "gemma2").ghost()
    assert heads.head(plain) is plain.lm_head
    names = set(capped.state_dict())
    assert isinstance(heads.head(capped), heads.ScaledHead)
    assert (heads.head(capped).in_features, heads.head(capped).out_features) == (32, 300)
    assert set(capped.state_dict()) == names


@pytest.mark.parametrize(
    ("family", "attention"), [("mistral", "sdpa"), ("mistral", "eager"), ("gemma3", "sdpa"), ("gemma2", "")]
)
def test_a_mask_of_ones_own_keeps_the_sliding_window(words, family, attention):
    model = chosen(words, family)
    model.attention = attention
    network, rows = born(model), batch(torch.arange(3, 43).reshape(2, 20))
    windowed = model.hidden(network, rows, {})
    assert torch.allclose(model.hidden(network, rows, {"attention_mask": causal(rows)}), windowed, atol=1e-6)
    network.config.sliding_window = None  # without the window the result is another one
    assert not torch.allclose(model.hidden(network, rows, {"attention_mask": causal(rows)}), windowed, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_stretched", "gemma3", "qwen3", "mixtral"])
def test_buffers_are_rebuilt_in_place_whatever_they_held(words, family):
    from transformers import AutoModelForCausalLM

    model = chosen(words, family)
    normal = dict(AutoModelForCausalLM.from_config(model.config(), dtype=torch.float32).named_buffers())
    network = born(model)
    weights = {name: parameter.clone() for name, parameter in network.named_parameters()}
    places = {name: buffer.data_ptr() for name, buffer in network.named_buffers()}
    for buffer in network.buffers():
        buffer.fill_(float("nan"))
    model.restore_buffers(network)
    assert normal
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, normal[name])
        assert buffer.data_ptr() == places[name]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())


def test_a_buffer_that_no_initialisation_sets_is_named(words):
    network = born(chosen(words, "llama"))
    network.model.layers[1].register_buffer("odd", torch.ones(3), persistent=False)
    with pytest.raises(UserError, match=r"model\.layers\.1\.odd"):
        buffers.restore(network)
