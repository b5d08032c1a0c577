import json

import pytest
import torch

from loomtune.errors import UserError
from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import RandomSettings
from plugins.models.conftest import batch, born, shape


def drawn(family: str, words, **more) -> Random:
    return Random(RandomSettings(shape={**shape(family), **more}, tokenizer=str(words)))


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
def test_a_slice_is_cut_from_the_tensor_that_every_layout_draws(words, family):
    first, again = drawn(family, words).weights(7), drawn(family, words).weights(7)
    for name, size in first.shapes().items():
        where = tuple(slice(length // 3, length // 3 + max(1, length // 2)) for length in size)
        part = again.read(name, where)  # read alone, before any other
        assert torch.equal(part, first.read(name)[where])
        assert torch.equal(first.read(name), first.read(name))


def test_seeds_and_names_give_other_weights(words):
    one, other = drawn("llama", words).weights(1), drawn("llama", words).weights(2)
    query = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(one.read(query.format(0)), other.read(query.format(0)))
    assert not torch.equal(one.read(query.format(0)), one.read(query.format(1)))


def test_drawing_disturbs_no_global_random_state(words):
    weights = drawn("llama", words).weights(1)
    before = torch.get_rng_state()
    weights.read("lm_head.weight")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_every_tensor_has_the_spread_that_the_models_own_initialisation_gives(words, family):
    from transformers import AutoModelForCausalLM

    chosen = drawn(family, words, initializer_range=0.05)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(chosen.config()).state_dict()
    weights = chosen.weights(0)
    for name, size in weights.shapes().items():
        ours = weights.read(name)
        if theirs[name].std() == 0:
            assert torch.equal(ours, theirs[name])
        else:
            error = 5 / (2 * ours.numel()) ** 0.5  # five standard errors of a standard deviation
            assert ours.std() / theirs[name].std() == pytest.approx(1, abs=2 * error), (name, size)
    first = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert weights.read(first).std() == pytest.approx(0.05, rel=0.05)


def test_a_drawn_mixture_of_experts_runs_forward(words):
    chosen = drawn("mixtral", words)
    chosen.check()
    network = born(chosen)
    logits = chosen.head(network)(chosen.hidden(network, batch(torch.arange(3, 33)[None]), {}))
    assert logits.shape == (1, 30, 300)
    assert logits.isfinite().all()


def test_special_tokens_come_from_the_tokenizer_where_the_shape_names_none(words):
    bare = {name: value for name, value in shape("llama").items() if not name.endswith("token_id")}
    chosen = Random(RandomSettings(shape=bare, tokenizer=str(words)))
    assert (chosen.config().bos_token_id, chosen.config().eos_token_id) == (1, 2)


def test_a_config_file_is_a_shape_and_single_values_can_be_set_over_it(saved, words):
    file = saved("llama") / "config.json"
    chosen = Random(RandomSettings(config=str(file), shape={"num_hidden_layers": 3}, tokenizer=str(words)))
    assert chosen.config().num_hidden_layers == 3
    assert chosen.config().hidden_size == 32
    beside = Random(RandomSettings(config=str(file)))
    assert beside.tokenizer_folder() == saved("llama")
    assert chosen.fingerprint() != beside.fingerprint()


def test_a_shape_without_an_architecture_is_refused(words):
    with pytest.raises(UserError, match="no architecture is named"):
        Random(RandomSettings(tokenizer=str(words))).check()
    with pytest.raises(UserError, match="none that transformers knows"):
        Random(RandomSettings(shape={"model_type": "lama"}, tokenizer=str(words))).config()


def test_the_config_that_is_saved_has_the_shape(words, tmp_path):
    drawn("qwen3", words).save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["hidden_size"] == 32


def test_an_end_of_generation_is_saved_with_the_config(words, tmp_path):
    model = drawn("llama", words)
    model.save_config(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == model.tokenizer().eos_id
    assert saved["pad_token_id"] == model.tokenizer().pad_id


@pytest.mark.parametrize("wrong", [{"hidden_size": "wide"}, {"num_attention_heads": 7}])
def test_a_shape_that_transformers_refuses_is_told_before_the_run(words, wrong):
    with pytest.raises(UserError, match="the shape is none that transformers knows"):
        drawn("llama", words, **wrong).check()


def test_new_tokens_have_rows_of_their_own_and_are_part_of_what_the_weights_are(words, tmp_path):
    shaped = {**shape("llama"), "vocab_size": 259}
    asked = {"shape": shaped, "tokenizer": str(words), "chat_template": "chatml"}
    with pytest.raises(UserError, match="takes to pieces") as refused:
        Random(RandomSettings(**asked)).check()
    assert "model.new_tokens=[" in refused.value.faults[0].cure
    marks = ["<|im_start|>", "<|im_end|>"]
    chosen, plain = Random(RandomSettings(**asked, new_tokens=marks)), Random(RandomSettings(shape=shaped))
    chosen.check()
    assert chosen.vocabulary() == chosen.config().vocab_size == 261
    assert chosen.weights(0).shapes()["model.embed_tokens.weight"][0] == 261
    assert chosen.fingerprint() != plain.fingerprint()
    chosen.save_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 261
    with pytest.raises(UserError, match="more than once"):
        Random(RandomSettings(**asked, new_tokens=[*marks, marks[0]])).find()
    assert Random(RandomSettings(**asked, new_tokens=marks, pad_vocabulary_to=64)).vocabulary() == 320
