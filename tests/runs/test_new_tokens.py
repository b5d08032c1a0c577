"""A model that learns tokens which it did not have: one curve in every layout, and what it leaves knows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loomtune import api
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings
from runs.curves import agree
from runs.worlds import Outcome, Worlds
from support import mixed_rows, write_rows

Train = Callable[..., Outcome]

TWO = ["<|user|>", "<|end|>"]
EMBEDDING = "model.embed_tokens.weight"
LAYOUTS = {
    "fsdp": ["sharding=fsdp"],
    "zero-3": ["sharding=zero", "sharding.stage=3", "sharding.persist=0"],
}
LORA = ["adapter=lora", "adapter.rank=4"]


@pytest.fixture(scope="module")
def chatty(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of a model whose 259 rows are all taken, on rows that write two new tokens."""
    marked = [
        {"prompt": f"<|user|>{row['prompt']}<|end|>", "completion": f"{row['completion']}<|end|>"}
        for row in mixed_rows(64, seed=5)
    ]
    rows = write_rows(tmp_path_factory.mktemp("chatty") / "rows.jsonl", marked)
    return [tiny[0], "data=jsonl", f"data.path={rows}", *tiny[3:], 'model.new_tokens=["<|user|>","<|end|>"]']


def opened(folder: Path) -> tuple[Any, Any]:
    """The model, with nothing missing or left over, and the tokenizer, as transformers opens them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model, AutoTokenizer.from_pretrained(folder)


def knows_them(folder: Path) -> torch.Tensor:
    """A folder that anybody opens knows the new tokens; gives its embedding."""
    model, tokenizer = opened(folder)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 261
    assert tokenizer("a<|end|>", add_special_tokens=False)["input_ids"][-1] == 260
    assert set(TWO) <= set(tokenizer.all_special_tokens)
    rows: torch.Tensor = model.get_input_embeddings().weight.detach()
    return rows


def first_rows(settings: list[str]) -> torch.Tensor:
    """The embedding before any step."""
    stored = load_file(Path(settings[0].removeprefix("model.path=")) / "model.safetensors")[EMBEDDING]
    return torch.cat([stored, stored.double().mean(0, keepdim=True).float().expand(2, -1)])


@pytest.mark.parametrize("layout", ["fsdp", pytest.param("zero-3", marks=pytest.mark.slow)])
def test_the_curve_is_that_of_one_process_and_the_model_that_leaves_needs_no_new_tokens(
    layout: str, train: Train, alone: Train, chatty: list[str], tmp_path: Path
) -> None:
    settings = [*chatty, "steps=6"]
    ended = train(2, settings, *LAYOUTS[layout])
    agree(ended, alone(*settings))
    rows = knows_them(out := api.export(ended.folder, tmp_path / "out"))
    knows_them(ended.folder / "checkpoints" / "step-00000006" / "model")
    assert ((rows - first_rows(chatty))[259:].abs().amax(1) > 1e-3).all(), "the new rows were trained"
    plain, repeated = (HuggingFace(HuggingFaceSettings(path=str(out), new_tokens=tokens)) for tokens in ([], TWO))
    repeated.check()
    assert repeated.tokenizer().fingerprint == plain.tokenizer().fingerprint
    assert (repeated.vocabulary(), repeated.fingerprint()) == (261, plain.fingerprint())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_in_another_layout(
    layout: str, worlds: Worlds, alone: Train, chatty: list[str], tmp_path: Path
) -> None:
    settings = [*chatty, "steps=8"]
    worlds.train(2, [*settings, *LAYOUTS[layout], "stop_after=4"], tmp_path / "run")
    agree(worlds.resume(1, tmp_path / "run", "sharding=single"), alone(*settings))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_adapter_leaves_with_the_new_rows_as_they_began(
    layout: str, train: Train, alone: Train, chatty: list[str], tmp_path: Path
) -> None:
    settings = [*chatty, *LORA, "steps=8"]
    ended = train(2, settings, *LAYOUTS[layout])
    agree(ended, alone(*settings))
    assert torch.equal(knows_them(api.export(ended.folder, tmp_path / "out")), first_rows(chatty))


def with_rows(settings: list[str]) -> list[str]:
    """Settings of LoRA that trains the rows of the new tokens beside it."""
    return [*settings, *LORA, 'adapter.tokens=["<|user|>","<|end|>"]', "steps=6"]


def test_an_adapter_trains_the_rows_of_new_tokens_and_leaves_all_others_to_the_bit(
    alone: Train, chatty: list[str], tmp_path: Path
) -> None:
    ended = alone(*with_rows(chatty))
    rows, before = knows_them(api.export(ended.folder, tmp_path / "out")), first_rows(chatty)
    assert torch.equal(rows[:259], before[:259])
    assert ((rows - before)[259:].abs().amax(1) > 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_of_an_adapter_with_rows_is_that_of_one_process(
    layout: str, train: Train, alone: Train, chatty: list[str]
) -> None:
    settings = with_rows(chatty)
    agree(train(2, settings, *LAYOUTS[layout]), alone(*settings))
