"""Prompt tuning: where its virtual tokens begin, and what room they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.adapters.virtual.prompt import Prompt
from loomtune_plugins.adapters.virtual.settings import PromptSettings

PARAMETER = "encoder.embedding.weight"


class Speaking:
    """A model with a tokenizer of letters and a context of 32 tokens."""

    def context(self) -> int:
        return 32

    def tokenizer(self) -> Speaking:
        return self

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


def first_values(settings: PromptSettings, llama, bring_to_life) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the virtual tokens, and the model's embeddings."""
    adapter, model = Prompt(settings), llama()
    adapter.meet(Speaking())
    _, source = bring_to_life(adapter, model)
    return source.read(PARAMETER), model.model.embed_tokens.weight.detach()


@pytest.mark.parametrize(("length", "ids"), [(5, [2, 0, 1, 2, 0]), (2, [2, 0])])
def test_a_text_is_repeated_or_cut_to_the_length(length, ids, llama, bring_to_life) -> None:
    found, table = first_values(PromptSettings(length=length, init="text", text="cab"), llama, bring_to_life)
    assert torch.equal(found, table[ids])


def test_the_vocabulary_gives_embeddings_of_different_tokens_as_long_as_there_are_some(llama, bring_to_life) -> None:
    found, table = first_values(PromptSettings(length=60), llama, bring_to_life)
    rows = [next(i for i in range(48) if torch.equal(row, table[i])) for row in found]
    assert sorted(rows[:48]) == list(range(48))
    assert rows[48:] == rows[:12]


def test_random_values_are_as_wide_as_embeddings(llama, bring_to_life) -> None:
    found, table = first_values(PromptSettings(length=40, init="random"), llama, bring_to_life)
    assert 0.9 * table.std() < found.std() < 1.1 * table.std()
    assert not any(torch.equal(row, real) for row in found for real in table)


def test_a_tied_embedding_is_found_under_whichever_name_it_is_stored(llama, bring_to_life) -> None:
    adapter, model = Prompt(PromptSettings(length=3)), llama(tied=True)
    _, source = bring_to_life(adapter, model)
    assert source.read(PARAMETER).shape == (3, 16)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (PromptSettings(length=-1), "adapter.length=-1"),
        (PromptSettings(init="txet"), r"adapter.init=txet is unknown. Did you mean 'text'"),
        (PromptSettings(init="text"), "(?s)adapter.text=''.*adapter.text to what"),
        (PromptSettings(text="unheard"), "(?s)adapter.init=vocabulary.*adapter.init=text"),
    ],
)
def test_settings_without_sense_are_refused(settings, reason) -> None:
    with pytest.raises(UserError, match=reason):
        Prompt(settings)


def test_what_no_model_could_take_is_refused_before_the_run() -> None:
    Prompt(PromptSettings(length=31)).suits(Speaking())
    with pytest.raises(UserError, match=r"(?s)adapter.length=32 leaves no room.*less than 32"):
        Prompt(PromptSettings(length=32)).suits(Speaking())
    silent = Speaking()
    silent.encode = lambda text: []
    with pytest.raises(UserError, match="has no token"):
        Prompt(PromptSettings(init="text", text=" ")).suits(silent)


def test_samples_are_cut_to_the_room_that_virtual_tokens_leave(tied_model: Path, mixed_data: Path, tmp_path) -> None:
    settings = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "adapter=prompt"]
    plan = api.compose([*settings, f"run.dir={tmp_path / 'run'}", "max_length=100000"], processes=1)
    with pytest.raises(UserError, match=r"of which the adapter takes 20\n.*set max_length to at most \d+"):
        api.prepare(plan)
