"""P-tuning: the network that makes virtual tokens, and what leaves of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from loomtune.errors import UserError
from loomtune_plugins.adapters.virtual.ptuning import Ptuning
from loomtune_plugins.adapters.virtual.settings import PtuningSettings


def test_layers_begin_as_wide_as_torchs(llama, bring_to_life) -> None:
    module, source = bring_to_life(Ptuning(PtuningSettings(length=64, width=400)), llama())
    assert 0.9 < source.read("encoder.embedding.weight").std() < 1.1
    for layer, inputs in ((0, 16), (2, 400), (4, 400)):
        for part in ("weight", "bias"):
            largest = source.read(f"encoder.mlp_head.{layer}.{part}").abs().max()
            assert 0.7 * inputs**-0.5 < largest <= inputs**-0.5
    assert module.encoder.mlp_head[2].weight.shape == (400, 400)


def test_the_width_is_the_models_own_where_none_is_set(llama, bring_to_life) -> None:
    module, _ = bring_to_life(Ptuning(PtuningSettings(length=3)), llama())
    assert module.encoder.mlp_head[0].weight.shape == (16, 16)


def test_what_the_network_makes_is_saved_and_not_the_network(llama, bring_to_life, tmp_path) -> None:
    adapter = Ptuning(PtuningSettings(length=3))
    module, _ = bring_to_life(adapter, llama())
    adapter.save(tmp_path, iter(module.named_parameters()), "base")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {"prompt_embeddings"}
    assert torch.equal(saved["prompt_embeddings"], module.encoder(torch.arange(3)[None])[0])


def test_a_width_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.width=-1"):
        Ptuning(PtuningSettings(width=-1))
