"""Plans for cutting transformers' models over ranks: which layers, which families, which numbers of ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from loomtune.errors import UserError
from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import RandomSettings

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "vocab_size": 300,
}


def model(**changes: Any) -> Random:
    return Random(RandomSettings(shape={**SIZES, **changes}))


def plan(ranks: int = 2, **changes: Any) -> dict[str, str]:
    built = model(**changes)
    with torch.device("meta"):
        return dict(built.tensor_plan(built.skeleton(), ranks))


def test_each_layer_of_a_llama_is_cut_as_transformers_says() -> None:
    found = plan()
    assert found["model.layers.1.self_attn.q_proj"] == found["model.layers.0.mlp.up_proj"] == "colwise"
    assert found["model.layers.1.self_attn.o_proj"] == found["model.layers.0.mlp.down_proj"] == "rowwise"
    assert len(found) == 2 * 7 + 2


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_cut_where_their_rows_divide_and_whole_elsewhere(tied: bool) -> None:
    ends = {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
    assert ends.items() <= plan(tie_word_embeddings=tied).items()
    assert not ends.keys() & plan(tie_word_embeddings=tied, vocab_size=301).keys()


@pytest.mark.parametrize(("ranks", "nearest"), [(4, 3), (5, 6), (12, 6)])
def test_heads_that_cannot_be_dealt_out_are_refused_with_the_nearest_that_can(ranks: int, nearest: int) -> None:
    with pytest.raises(UserError, match=rf"heads cannot be dealt out to {ranks} ranks evenly") as error:
        model().check_tensor(ranks)
    assert f"set sharding.tensor={nearest}" in str(error.value)


def test_a_feed_forward_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="97 intermediate_size cannot be dealt out to 2 ranks") as error:
        model(intermediate_size=97).check_tensor(2)
    assert "set sharding.tensor=1" in str(error.value)


def test_heads_count_only_where_attention_works_on_some_of_them() -> None:
    model(model_type="phi3", num_key_value_heads=3).check_tensor(2)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("mixtral", "layers of mixtral models are cut as moe_tp_experts, packed_colwise"),
        ("gpt2", "transformers has no plan to cut the layers of gpt2 models over ranks"),
    ],
)
def test_a_family_whose_layers_cannot_be_cut_is_refused_with_the_reason(family: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as error:
        model(model_type=family).check_tensor(2)
    assert "set sharding.tensor=1" in str(error.value)
