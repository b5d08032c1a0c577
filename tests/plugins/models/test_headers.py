import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from loomtune_plugins.models.huggingface import HuggingFace, Tiny
from loomtune_plugins.models.settings import HuggingFaceSettings, TinySettings


def model(path) -> HuggingFace:
    return HuggingFace(HuggingFaceSettings(path=str(path)))


def wanted(chosen) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in chosen.ghost().state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "gemma2", "gpt2"])
def test_what_the_files_say_is_what_the_skeleton_has(saved, family):
    assert model(saved(family)).stored() == wanted(model(saved(family)))


def test_what_the_shipped_models_file_says_is_what_its_skeleton_has():
    assert Tiny(TinySettings()).stored() == wanted(Tiny(TinySettings()))


def test_weights_over_several_files_are_all_found(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert model(tmp_path).stored() == wanted(model(saved("llama")))


def test_rotary_tables_of_old_files_are_no_weights(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "old")
    stored = load_file(folder / "model.safetensors")
    table = stored["model.norm.weight"].clone()
    save_file({**stored, "model.layers.0.self_attn.rotary_emb.inv_freq": table}, folder / "model.safetensors")
    assert model(folder).stored() == wanted(model(saved("llama")))


@pytest.mark.parametrize("content", [b"", b"no header of any kind, only words", (2).to_bytes(8, "little") + b"{]"])
def test_where_it_is_not_known_nothing_is_said(saved, tmp_path, content):
    folder = shutil.copytree(saved("llama"), tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(content)
    assert model(folder).stored() == {}
    assert model(tmp_path / "absent").stored() == {}
    assert model("somebody/elsewhere").stored() == {}


def test_neither_torch_nor_transformers_is_needed(saved):
    program = """
import json, sys
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings
print(json.dumps(HuggingFace(HuggingFaceSettings(path=sys.argv[1])).stored()))
assert not {"torch", "transformers", "safetensors"} & set(sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", program, str(saved("llama"))], check=True, capture_output=True)
    assert {name: tuple(shape) for name, shape in json.loads(said.stdout).items()} == wanted(model(saved("llama")))
