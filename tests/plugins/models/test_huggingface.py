import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit.network import Network
from loomtune_plugins.adapters.full import Full
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.settings import FullSettings, LoraSettings
from loomtune_plugins.models.huggingface import HuggingFace, Tiny
from loomtune_plugins.models.settings import HuggingFaceSettings, TinySettings
from plugins.models.conftest import SHARED, batch, born, causal

STORIES = SHARED / "models" / "stories260k"


def model(path: Path | str, **settings) -> HuggingFace:
    return HuggingFace(HuggingFaceSettings(path=str(path), **settings))


def pretrained(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(1))


LLAMAS = ("llama", "llama_tied", "llama_stretched", "mistral", "mixtral")
OTHERS = ("qwen2", "qwen3", "gemma2", "gemma3", "granite", "cohere")


@pytest.mark.parametrize("family", [*LLAMAS, *OTHERS])
def test_a_birth_without_storage_computes_bit_for_bit_what_from_pretrained_computes(saved, family):
    theirs, ours = pretrained(saved(family)).train(), born(chosen := model(saved(family)))
    rows = batch(tokens())
    expected = theirs(rows.tokens, use_cache=False).logits
    assert torch.equal(chosen.head(ours)(chosen.hidden(ours, rows, {})), expected)
    assert torch.equal(chosen.head(ours)(chosen.hidden(ours, rows, {"attention_mask": causal(rows)})), expected)
    buffers = dict(ours.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in theirs.named_buffers())


def test_positions_that_start_anew_keep_samples_apart_in_a_row(saved):
    network = born(chosen := model(saved("llama")))
    rows = batch(tokens(2, 10))
    row = replace(batch(rows.tokens.reshape(1, 20)), positions=rows.positions.reshape(1, 20))
    packed, alone = chosen.hidden(network, row, {}), chosen.hidden(network, rows, {})
    assert torch.allclose(packed.reshape(2, 10, -1), alone, atol=1e-6)


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
def test_slices_equal_what_is_cut_from_the_whole(saved, family):
    chosen = model(saved(family))
    weights, state = chosen.weights(0), pretrained(saved(family)).state_dict()
    for name, shape in weights.shapes().items():
        whole = weights.read(name)
        assert torch.equal(whole, state[name])
        inner = tuple(slice(size // 3, size // 3 + max(1, size // 2)) for size in shape)
        for where in (inner, inner[:1], (slice(0, 0),), tuple(slice(size, size) for size in shape)):
            assert torch.equal(weights.read(name, where), whole[where]), (name, where)


def test_tied_names_come_once_and_can_still_be_read(saved):
    weights = model(saved("llama_tied")).weights(0)
    assert "lm_head.weight" not in weights.shapes()
    assert torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight"))
    with pytest.raises(KeyError):
        weights.read("model.no_such.weight")


def test_weights_can_be_read_while_the_meta_device_is_the_default(saved):
    weights = model(saved("llama")).weights(0)
    with torch.device("meta"):
        assert weights.read("model.norm.weight", (slice(0, 4),)).device.type == "cpu"


def test_files_of_a_base_model_alone_are_read_under_the_whole_models_names(saved, tmp_path):
    folder = shutil.copytree(saved("llama_tied"), tmp_path / "base")
    stored = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    weights = model(folder).weights(0)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in stored.items())


def test_several_files_with_an_index_are_one_source(saved, tmp_path):
    expected = load_file(saved("qwen3") / "model.safetensors")
    pretrained(saved("qwen3")).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = model(tmp_path).weights(0)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("adapter", [Full(FullSettings()), Lora(LoraSettings(rank=2))], ids=["full", "lora"])
def test_a_scalar_head_that_a_run_left_beside_the_weights_is_the_next_ones_first_value(saved, tmp_path, adapter):
    folder = shutil.copytree(saved("llama"), tmp_path / "scored")
    trained = torch.arange(float(json.loads((folder / "config.json").read_text())["hidden_size"]))[None]
    before = model(folder).fingerprint()
    save_file({"heads.reward.weight": trained}, folder / "heads.safetensors")
    network = Network(replace(toy.spec(model(folder), heads=("reward", "_value")), adapter=adapter))
    assert torch.equal(network.initial("heads.reward.weight", None), trained)
    assert torch.equal(network.initial("heads.reward.weight", (slice(0, 1), slice(2, 4))), trained[:, 2:4])
    assert torch.equal(network.initial("heads._value.weight", None), trained), "a value begins as what scored"
    assert model(folder).fingerprint() != before


def test_missing_and_unexpected_weights_are_named(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "wrong")
    stored = load_file(folder / "model.safetensors")
    stored["model.stray.weight"] = stored.pop("model.norm.weight")
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight missing; model\.stray\.weight unexpected"):
        model(folder).weights(0)


def test_tied_names_that_differ_in_the_file_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "untied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="are tied by the config and differ"):
        model(folder).weights(0)


def test_the_skeleton_trains_without_a_cache_and_generates_with_one(saved):
    network = born(model(saved("llama")))
    assert network.training
    assert not network.config.use_cache
    caches = []
    network.model.register_forward_hook(
        lambda _, __, arguments, output: caches.append(output.past_key_values), with_kwargs=True
    )
    prompt = tokens(1, 5)
    ours = network.eval().generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
    assert all(cache is not None for cache in caches)
    theirs = pretrained(saved("llama")).generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)


def test_building_a_skeleton_disturbs_no_global_random_state(saved):
    chosen = model(saved("llama"))
    before = torch.get_rng_state()
    chosen.skeleton()
    assert torch.equal(before, torch.get_rng_state())


def test_blocks_are_the_decoders_layers_in_order(saved):
    chosen = model(saved("mixtral"))
    network = chosen.skeleton()
    assert chosen.blocks(network) == list(network.model.layers)


@pytest.mark.parametrize(("family", "name"), [("llama_tied", "LlamaForCausalLM"), ("mixtral", "MixtralForCausalLM")])
def test_what_is_saved_makes_the_folder_loadable(saved, tmp_path, family, name):
    chosen = model(saved(family))
    weights = chosen.weights(0)
    chosen.save_config(tmp_path)
    chosen.tokenizer().save(tmp_path)
    save_file({key: weights.read(key) for key in weights.shapes()}, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [name]
    assert config["dtype"] == "float32"
    assert config["use_cache"] is True
    theirs, again = pretrained(saved(family)), pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)
    assert model(tmp_path).tokenizer().fingerprint == chosen.tokenizer().fingerprint


def test_facts_of_a_model_need_no_skeleton(saved):
    chosen = model(saved("llama"))
    assert (chosen.vocabulary(), chosen.context()) == (300, 64)
    assert (model(saved("gpt2")).vocabulary(), model(saved("gpt2")).context()) == (300, 64)


def test_the_fingerprint_follows_the_weights_and_not_the_place(saved, tmp_path):
    original = model(saved("llama")).fingerprint()
    folder = shutil.copytree(saved("llama"), tmp_path / "moved")
    assert model(folder).fingerprint() == original
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][0] += 1
    save_file(stored, folder / "model.safetensors")
    assert model(folder).fingerprint() != original


def test_a_run_stands_for_its_latest_or_best_checkpoint(saved, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 0\n")
    for number, family in ((20, "llama"), (40, "qwen3")):
        shutil.copytree(saved(family), tmp_path / "checkpoints" / f"step-{number:08}" / "model")
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000040\n")
    (tmp_path / "checkpoints" / "BEST").write_text("step-00000020\n")
    assert model(tmp_path).described()["model_type"] == "qwen3"
    assert model(tmp_path, checkpoint="best").described()["model_type"] == "llama"
    with pytest.raises(UserError, match="latest or best"):
        model(tmp_path, checkpoint="first").check()


def test_a_run_of_which_only_an_adapter_was_kept_names_the_cure(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="has no latest checkpoint"):
        model(tmp_path).check()
    (tmp_path / "checkpoints" / "step-00000040" / "adapter").mkdir(parents=True)
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000040")
    with pytest.raises(UserError, match=r"(?s)only an adapter.*loomtune export"):
        model(tmp_path).check()


def test_a_misspelt_folder_is_met_with_its_neighbour(saved, tmp_path, monkeypatch):
    shutil.copytree(saved("llama"), tmp_path / "models" / "small-llama")
    with pytest.raises(UserError, match="Did you mean 'small-llama'"):
        model(tmp_path / "models" / "smal-llama").check()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'small-llama'"):  # two names with a slash, but no repository's
        model("models/smal-llama").check()


def test_pickled_weights_are_refused_unread(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match=r"(?s)pickles.*save_pretrained"):
        model(folder).check()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{", "not JSON"),
        ("config.json", '{"quantization_config": {"bits": 4}}', "quantised"),
        ("model.safetensors", None, "lacks model.safetensors"),
        ("tokenizer.json", None, "no tokenizer"),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason(saved, tmp_path, name, content, what):
    folder = shutil.copytree(saved("llama"), tmp_path / "broken")
    (folder / name).write_text(content) if content is not None else (folder / name).unlink()
    with pytest.raises(UserError, match=what):
        model(folder).check()


def test_another_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(saved, words, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match="ids up to 258, the embedding 100 rows"):
        model(folder, tokenizer=str(words)).check()


def test_a_hub_id_is_downloaded_without_pickles(saved, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(saved("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    chosen = model("acme/llama-9.5b", revision="v2")
    chosen.check()
    assert (asked["name"], asked["revision"]) == ("acme/llama-9.5b", "v2")
    assert not any(
        fnmatch(name, pattern) for name in ("pytorch_model.bin", "run.py") for pattern in asked["allow_patterns"]
    )
    assert chosen.folder == saved("llama")


def test_a_hub_that_cannot_be_reached_is_said_with_the_cure(monkeypatch):
    def download(name, **settings):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"(?s)no route.*set model\.path to a local folder"):
        model("acme/llama").check()


def test_an_unknown_attention_is_refused_with_the_nearest(saved):
    with pytest.raises(UserError, match="Did you mean 'eager'"):
        model(saved("llama"), attention="eagre").check()
    assert model(saved("llama"), attention="eager").skeleton().config._attn_implementation == "eager"


def test_trusting_foreign_code_is_said_aloud(saved, capsys):
    model(saved("llama"), trust_remote_code=True).check()
    assert "RUNS WITH YOUR RIGHTS" in capsys.readouterr().err
    model(saved("llama")).check()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is absent")
def test_a_published_model_tells_its_story():
    chosen = model(STORIES)
    chosen.check()
    network, tokenizer = born(chosen).eval(), chosen.tokenizer()
    start = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("Once upon a time")]])
    told = network.generate(start, max_new_tokens=60, do_sample=False, use_cache=True)[0].tolist()
    assert tokenizer.decode(told).startswith("Once upon a time, there was a little girl named Lily.")
    rows = batch(start)
    expected = pretrained(STORIES)(rows.tokens, use_cache=False).logits
    assert torch.equal(chosen.head(network)(chosen.hidden(network, rows, {})), expected)


def test_the_shipped_model_is_there_and_small():
    chosen = Tiny(TinySettings())
    chosen.check()
    network = born(chosen)
    assert network.config.vocab_size == chosen.vocabulary()
    assert sum(file.stat().st_size for file in chosen.folder.iterdir()) < 6 * 2**20


def test_its_origin_is_a_whole_path_or_the_id_and_stays_where_a_run_goes_on(saved, tmp_path, monkeypatch):
    shutil.copytree(saved("llama"), tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert model("here").origin == model(tmp_path / "here").origin == str(tmp_path / "here")
    assert model("org/name").origin == "org/name"
    assert Path(Tiny(TinySettings()).origin).is_absolute() and Path(Tiny(TinySettings()).origin).is_dir()
    (tmp_path / "run.yaml").write_text("seed: 0\n")
    for step in ("step-00000001", "step-00000002"):
        shutil.copytree(saved("llama"), tmp_path / "checkpoints" / step / "model")
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000001\n")
    first = model(tmp_path)
    assert first.folder == tmp_path / "checkpoints" / "step-00000001" / "model" and first.origin == str(first.folder)
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000002\n")
    assert first.origin == str(first.folder) and model(tmp_path).origin != first.origin
