"""What LoRA asks of a model before any process exists, and models of other kinds."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adapter_fakes import InMemory, logits, streamed, train
from loomtune.contracts import Model
from loomtune.errors import UserError
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.settings import LoraSettings
from loomtune_plugins.adapters.wrapped.targets import linear_layers
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings


def hf(folder: Path) -> Model:
    return HuggingFace(HuggingFaceSettings(path=str(folder)))


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def woven(adapter: Lora, model: GPT2LMHeadModel):
    """Woven in place: the model keeps its own values, and what was added gets its first ones."""
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.device("meta"):
        module, source = adapter.weave(copy.deepcopy(model), InMemory(base), 7)
    with torch.no_grad():
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(source.read(name).clone(), parameter.requires_grad)
            getattr(module.get_submodule(owner), "_parameters")[leaf] = value  # noqa: B009
    adapter.base(module).lm_head.weight = adapter.base(module).transformer.wte.weight
    return module.eval(), source


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"init": "pissa"}, {"init": "pissa", "dora": True}])
def test_the_layers_of_gpt2_are_adapted_as_by_peft(more, gpt2, tokens, tmp_path) -> None:
    adapter = Lora(LoraSettings(rank=4, alpha=8, **more))
    module, source = woven(adapter, gpt2)
    torch.testing.assert_close(logits(module, tokens), logits(gpt2, tokens), atol=1e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = {"init_lora_weights": more["init"]} if "init" in more else {}
        names = ["c_attn", "c_proj", "c_fc"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=more.get("dora", False), **start)
        theirs = get_peft_model(copy.deepcopy(gpt2), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(source.read(name))
    train(module, tokens, lr=0.1)
    train(theirs, tokens, lr=0.1)
    said = logits(module, tokens)
    torch.testing.assert_close(said, logits(theirs, tokens), atol=1e-4, rtol=1e-3)
    with adapter.off(module):
        torch.testing.assert_close(logits(module, tokens), logits(gpt2, tokens), atol=1e-4, rtol=1e-4)
    adapter.save(tmp_path, streamed(module), "base")
    opened = PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path)
    torch.testing.assert_close(logits(opened, tokens), said, atol=1e-4, rtol=1e-3)
    gpt2.load_state_dict(dict(adapter.merged(streamed(module))), strict=False)
    torch.testing.assert_close(logits(gpt2, tokens), said, atol=1e-4, rtol=1e-3)


def test_methods_that_cannot_adapt_the_layers_of_gpt2_say_so(gpt2) -> None:
    for targets in (["all-linear"], ["c_attn"], ["lm_head", "h.0.*"]):
        with pytest.raises(UserError, match=r"(?s)'transformer\.h\.0\.attn\.c_attn'.*Conv1D.*adapter=lora"):
            linear_layers(gpt2, targets, "Other")


def test_the_files_of_a_model_say_enough_where_all_is_well(tied_model, monkeypatch) -> None:
    def fail(self) -> None:
        raise AssertionError("a skeleton is built")

    model = hf(tied_model)
    assert model.stored()
    monkeypatch.setattr(type(model), "skeleton", fail)
    for targets in (None, ["all-linear"], ["q_proj", "layers.0-1.mlp.*"]):
        Lora(LoraSettings(rank=4, targets=targets)).suits(model)
    for wrong in ({"rank": 1000}, {"targets": ["q_porj"]}, {"targets": ["lm_head"]}, {"modules": ["norm"]}):
        with pytest.raises(AssertionError, match="skeleton"):
            Lora(LoraSettings(**{"rank": 4, **wrong})).suits(model)


REFUSED = {
    "a target": ({"targets": ["q_porj"]}, r"'q_porj', which matches no linear layer. Did you mean 'q_proj'"),
    "the rank": ({"rank": 1000}, r"adapter.rank=1000 is more than"),
    "a tied head": ({"targets": ["lm_head"]}, "tied to model.embed_tokens"),
    "a tied module": ({"modules": ["lm_head"]}, "(?s)tied to that of model.embed_tokens.*adapter.tokens"),
    "a module": ({"modules": ["nrom"]}, "adapter.modules names 'nrom', which matches no module"),
    "a module that is adapted": ({"modules": ["q_proj"]}, "leave it out of one of the two"),
    "a token": ({"tokens": ["loom", "</S>"]}, "(?s)'loom', which is no token.*'</S>'.*Did you mean '</s>'"),
    "a row": ({"tokens": [5, 100000]}, "adapter.tokens names 100000, and the model has"),
    "a first value": ({"init": "eva"}, "(?s)adapter.init=eva needs data.*set adapter.init to kaiming"),
    "a misspelt one": ({"init": "pisa"}, "Did you mean 'pissa'"),
    "an odd rank": ({"init": "orthogonal", "rank": 3}, "needs an even rank"),
}


@pytest.mark.parametrize("settings,what", REFUSED.values(), ids=REFUSED)
def test_what_does_not_suit_is_refused_in_the_launching_process(settings, what, tied_model) -> None:
    with pytest.raises(UserError, match=what):
        Lora(LoraSettings(**{"rank": 4, **settings})).suits(hf(tied_model))


def test_tokens_are_looked_up_as_they_are_written(tied_model) -> None:
    adapter = Lora(LoraSettings(rank=4, tokens=["</s>", "e", 7, "e"]))
    adapter.meet(model := hf(tied_model))
    tokenizer = model.tokenizer()
    assert adapter.config(["q_proj"]).trainable_token_indices == sorted({2, 7, *tokenizer.encode("e")})


@pytest.mark.parametrize(
    "setting,what",
    [
        ("adapter.path=nowhere", "adapter_config"),
        pytest.param("adapter.targets=[q_porj]", "Did you mean 'q_proj'?", marks=pytest.mark.slow),
    ],
)
def test_the_command_refuses_with_exit_code_2_and_leaves_no_folder(
    setting: str, what: str, tied_model, mixed_data, tmp_path
) -> None:
    run = tmp_path / "run"
    settings = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", f"run.dir={run}", "adapter=lora"]
    command = [sys.executable, "-m", "loomtune.cli", "train", *settings, "adapter.rank=4", setting]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert what in ran.stderr + ran.stdout
    assert not run.exists()
