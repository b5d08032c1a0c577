"""LoRA that goes on from an adapter of peft's, and LoRA that stands on others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapter_fakes import logits, streamed, train
from loomtune.errors import UserError
from loomtune_plugins.adapters.lora.lora import Lora
from loomtune_plugins.adapters.settings import LoraSettings
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings


@pytest.fixture
def by_peft(tmp_path, llama):
    """Makes an adapter with peft, every number of it drawn, and saves it: its folder."""

    def made(name: str = "theirs", tied: bool = False, **config: Any) -> Path:
        told = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | config
        model = get_peft_model(llama(tied), LoraConfig(**told))
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"q_proj": 10}},
    "more": {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 9]},
}


def opened(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(model), folder)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_goes_on_from_an_adapter(config, by_peft, llama, bring_to_life, tokens, tmp_path) -> None:
    model, folder = llama(), by_peft(**config)
    adapter = Lora(LoraSettings(path=str(folder)))
    module, _ = bring_to_life(adapter, model)
    torch.testing.assert_close(logits(module, tokens), logits(opened(model, folder), tokens), atol=1e-5, rtol=1e-5)
    train(module, tokens, lr=0.1)
    said = logits(module, tokens)
    adapter.save(tmp_path / "ours", streamed(module), "base")
    torch.testing.assert_close(logits(opened(model, tmp_path / "ours"), tokens), said, atol=1e-4, rtol=1e-4)
    model.load_state_dict(dict(adapter.merged(streamed(module))))
    torch.testing.assert_close(logits(model, tokens), said, atol=1e-4, rtol=1e-4)


def test_what_was_typed_may_say_the_same_and_nothing_else(by_peft) -> None:
    folder = str(by_peft())
    Lora(LoraSettings(path=folder, rank=4, alpha=6, dora=False, dropout=0.1))
    with pytest.raises(UserError) as caught:
        Lora(LoraSettings(path=folder, rank=8, rslora=True, init="olora", targets=["q_proj"]))
    assert len(caught.value.faults) == 4
    assert "adapter.rank=8 contradicts adapter.path, whose adapter has 4" in str(caught.value)


class Met:
    "A model whose tokenizer writes its tokens as numbers."

    def vocabulary(self) -> int:
        return 48

    def tokenizer(self) -> Any:
        return self

    def encode(self, text: str) -> list[int]:
        return [int(text)]


MEANT = [
    {"modules": ["*norm"]},
    {"modules": ["model.norm", "layers.*.*norm"]},
    {"tokens": [9, 3]},
    {"tokens": ["9", 3]},
]
OTHERS = [{"modules": ["model.norm"]}, {"modules": ["*norm", "lm_head"]}, {"tokens": [9]}, {"tokens": ["9", "4"]}]


def goes_on(folder: Path, typed: dict[str, Any], live: Any, model: Any) -> None:
    adapter = Lora(LoraSettings(path=str(folder), **typed))
    adapter.meet(Met())  # type: ignore[arg-type]
    live(adapter, model)


@pytest.mark.parametrize("typed", MEANT, ids=str)
def test_what_means_that_which_the_adapter_has_contradicts_nothing(typed, by_peft, llama, bring_to_life) -> None:
    goes_on(by_peft(modules_to_save=["norm"], trainable_token_indices=[3, 9]), typed, bring_to_life, llama())


@pytest.mark.parametrize("typed", OTHERS, ids=str)
def test_what_means_more_or_less_than_the_adapter_has_contradicts_it(typed, by_peft, llama, bring_to_life) -> None:
    folder, (key,) = by_peft(modules_to_save=["norm"], trainable_token_indices=[3, 9]), typed
    with pytest.raises(UserError, match=f"adapter.{key}=.* contradicts adapter.path, whose adapter has"):
        goes_on(folder, typed, bring_to_life, llama())


def test_the_embedding_by_its_last_name_is_that_of_the_adapter(by_peft, llama, bring_to_life) -> None:
    goes_on(by_peft(modules_to_save=["embed_tokens"]), {"modules": ["embed_tokens"]}, bring_to_life, llama())


def test_at_which_rank_a_run_goes_on_is_said_once(by_peft, tied_model, capsys) -> None:
    adapter = Lora(LoraSettings(path=str(by_peft(r=5))))
    for _ in range(2):
        with pytest.raises(UserError, match="as a layer of"):
            adapter.suits(HuggingFace(HuggingFaceSettings(path=str(tied_model))))
    assert capsys.readouterr().err.count("adapter.path goes on at the rank of its file, 5: twice") == 1


def change(folder: Path, **config: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def keep(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    return folder


def as_pickle(folder: Path) -> Path:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


FAULTS = {
    "a pickle": (as_pickle, "as a pickle .*safe_serialization=True"),
    "another method": (lambda folder: change(folder, peft_type="LOHA"), "type LOHA, not LORA"),
    "unknown layers": (lambda folder: change(folder, lora_bias=True), "lora_bias=True"),
    "a changed base": (lambda folder: change(folder, init_lora_weights="pissa"), "path_initial_model_for_weight"),
    "nothing": (lambda folder: folder / "nowhere", "holds no adapter_config.json"),
    "half a layer": (
        lambda folder: keep(folder, lambda all: {k: v for k, v in all.items() if "1.mlp.down_proj.lora_B" not in k}),
        "without its other half",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", ["path", "under"])
@pytest.mark.parametrize("spoil,what", FAULTS.values(), ids=FAULTS)
def test_files_that_cannot_be_used_are_refused_before_any_model(spoil, what, key, by_peft) -> None:
    folder = str(spoil(by_peft()))
    with pytest.raises(UserError, match=f"(?s)adapter.{key}.*{what}"):
        Lora(LoraSettings(path=folder) if key == "path" else LoraSettings(under=[folder]))


MISFITS = {
    "a layer that is not there": (
        lambda all: {k.replace("layers.1.mlp.down_proj", "layers.1.mlp.donw_proj"): v for k, v in all.items()},
        "adapts 'model.layers.1.mlp.donw_proj', .* Did you mean 'model.layers.1.mlp.down_proj'",
    ),
    "another width": (
        lambda all: {k: v[:, :5].clone() if "layers.1.mlp.down_proj.lora_A" in k else v for k, v in all.items()},
        "as a layer of 5 to 16, and the model's is 24 to 16",
    ),
    "another rank": (
        lambda all: {k: v[:3].clone() if "q_proj.lora_A" in k else v for k, v in all.items()},
        r"shape \(3, 16\), where the model needs \(4, 16\)",
    ),
    "a stranger": (
        lambda all: all | {"base_model.model.model.strange.weight": torch.ones(3)},
        "strange",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", ["path", "under"])
@pytest.mark.parametrize("spoil,what", MISFITS.values(), ids=MISFITS)
def test_files_that_do_not_fit_the_model_are_refused(spoil, what, key, by_peft, llama, bring_to_life) -> None:
    folder = str(keep(by_peft(), spoil))
    settings = {"path": folder} if key == "path" else {"under": [folder], "rank": 2}
    with pytest.raises(UserError, match=f"(?s)adapter.*{what}"):
        bring_to_life(Lora(LoraSettings(**settings)), llama())


def test_an_adapter_stands_on_others_which_stay_when_it_is_off(by_peft, llama, bring_to_life, tokens, tmp_path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 10}}
    model, folders = llama(), [by_peft("first", **patterns), by_peft("second", use_rslora=True, lora_dropout=0.5)]
    adapter = Lora(LoraSettings(rank=3, targets=["q_proj", "up_proj"], under=[str(folder) for folder in folders]))
    module, source = bring_to_life(adapter, model)
    stacked = opened(model, folders[0])
    stacked.load_adapter(folders[1], "second")
    stacked.base_model.set_adapter(["default", "second"])
    before = logits(stacked.eval(), tokens)
    torch.testing.assert_close(logits(module, tokens), before, atol=1e-5, rtol=1e-5)

    train(module, tokens, lr=0.1)
    assert not torch.allclose(logits(module, tokens), before, atol=1e-3)
    with adapter.off(module):
        torch.testing.assert_close(logits(module, tokens), before, atol=1e-5, rtol=1e-5)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.detach(), source.read(name)) != parameter.requires_grad, name
        assert parameter.requires_grad == (".default." in name)

    leaves_alike(adapter, module, model, tokens, tmp_path / "ours")


def leaves_alike(adapter: Lora, module: Any, model: Any, tokens: Any, folder: Path) -> None:
    """The saved adapter alone on the plain base, and the merged model, say what the run says."""
    said = logits(module, tokens)
    adapter.save(folder, streamed(module), "base")
    alone = opened(model, folder)
    assert list(alone.peft_config) == ["default"]
    torch.testing.assert_close(logits(alone.eval(), tokens), said, atol=1e-4, rtol=1e-4)
    merged = dict(adapter.merged(streamed(module)))
    assert merged.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(merged)
    torch.testing.assert_close(logits(model, tokens), said, atol=1e-4, rtol=1e-4)


def test_what_stood_on_others_has_one_rank_in_its_file_and_a_run_goes_on_from_it(
    by_peft, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, under = llama(), by_peft("first", target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 7})
    adapter = Lora(LoraSettings(rank=3, alpha=5, rslora=True, targets=["q_proj", "v_proj"], under=[str(under)]))
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, lr=0.1)
    adapter.save(tmp_path / "ours", streamed(module), "base")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (7, {}, {})
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    on, _ = bring_to_life(Lora(LoraSettings(path=str(tmp_path / "ours"))), model)
    torch.testing.assert_close(logits(on, tokens), logits(module, tokens), atol=1e-4, rtol=1e-4)


def test_an_adapter_that_goes_on_with_ranks_of_its_own_stands_on_another(
    by_peft, llama, bring_to_life, tokens, tmp_path
) -> None:
    model, under = llama(), by_peft("first", use_rslora=True, target_modules=["q_proj", "up_proj"])
    path = by_peft("patterns", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 10})
    adapter = Lora(LoraSettings(path=str(path), under=[str(under)]))
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, lr=0.1)
    leaves_alike(adapter, module, model, tokens, tmp_path / "ours")


@pytest.mark.parametrize(
    "more,what",
    [
        ({"modules": ["lm_head"]}, r"trains 'lm_head' whole, and an adapter in adapter\.under.*merge it into its base"),
        ({"tied": True}, r"adapter\.under adapts 'lm_head', whose weight is tied.*merge it into its base"),
    ],
)
def test_what_one_file_cannot_say_is_refused_before_training(more, what, by_peft, llama) -> None:
    tied = more.pop("tied", False)
    adapter = Lora(LoraSettings(rank=2, under=[str(by_peft(target_modules=["q_proj", "lm_head"]))], **more))
    with torch.device("meta"), pytest.raises(UserError, match=f"(?s){what}"):
        adapter.layers(llama(tied))


def test_modules_and_tokens_are_trained_beside_what_stands_on_another(
    by_peft, llama, bring_to_life, tokens, tmp_path
) -> None:
    model = llama()
    adapter = Lora(LoraSettings(rank=2, modules=["lm_head"], tokens=[3, 9], under=[str(by_peft())]))
    module, _ = bring_to_life(adapter, model)
    train(module, tokens, lr=0.1)
    leaves_alike(adapter, module, model, tokens, tmp_path / "ours")


def test_pissa_and_tokens_stand_on_another(by_peft, llama, bring_to_life, tokens, tmp_path) -> None:
    model, folder = llama(), by_peft()
    adapter = Lora(LoraSettings(rank=4, init="pissa", tokens=[3, 9], under=[str(folder)]))
    module, _ = bring_to_life(adapter, model)
    before = logits(opened(model, folder), tokens)
    torch.testing.assert_close(logits(module, tokens), before, atol=1e-4, rtol=1e-4)
    train(module, tokens, lr=0.1)
    with adapter.off(module):
        torch.testing.assert_close(logits(module, tokens), before, atol=1e-4, rtol=1e-4)
    leaves_alike(adapter, module, model, tokens, tmp_path / "ours")


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_only_plain_additions_can_stay_beneath(config, by_peft) -> None:
    with pytest.raises(UserError, match=r"(?s)adapter\.under.*only plain additions.*merge it into its base"):
        Lora(LoraSettings(under=[str(by_peft(**config))]))


def test_dora_stands_on_nothing(by_peft) -> None:
    with pytest.raises(UserError, match=r"cannot stand on adapter\.under"):
        Lora(LoraSettings(under=[str(by_peft())], dora=True))


def test_lora_on_a_merged_export_and_beneath_it_say_the_same(by_peft, llama, bring_to_life, tokens) -> None:
    model, folder = llama(), by_peft()
    on, _ = bring_to_life(Lora(LoraSettings(rank=2, under=[str(folder)])), model)
    merged, _ = bring_to_life(Lora(LoraSettings(rank=2)), opened(model, folder).merge_and_unload())
    train(on, tokens, lr=0.1)
    train(merged, tokens, lr=0.1)
    torch.testing.assert_close(logits(on, tokens), logits(merged, tokens), atol=1e-4, rtol=1e-4)


def test_the_fingerprint_follows_every_file_and_not_the_place(by_peft, tmp_path) -> None:
    one, two = by_peft("one"), by_peft("two more")

    def of(**settings: Any) -> str:
        return Lora(LoraSettings(**settings)).fingerprint()

    assert of() == "" and len(of(path=str(one))) == 64
    assert len({of(path=str(one)), of(path=str(two)), of(under=[str(one), str(two)]), of(under=[str(two)] * 2)}) == 4
    moved = one.rename(tmp_path / "elsewhere")
    before = of(under=[str(moved)]), of(under=[str(two), str(moved)])
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    after = of(under=[str(moved)]), of(under=[str(two), str(moved)])
    assert before[0] != after[0] and before[1] != after[1]
