"""Small models of many families, made once for all tests of the axis."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune.contracts import Batch, Model

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[3].parent / "shared"))

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_stretched": {"model_type": "llama", "rope_scaling": STRETCHED, "rope_theta": 5e5},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 6},
    "granite": {"model_type": "granite", "logits_scaling": 3.0},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def shape(family: str) -> dict[str, Any]:
    sizes = {"vocab_size": 300} if family == "gpt2" else SIZES
    return {**sizes, **FAMILIES[family]}


def config(family: str) -> Any:
    from transformers import AutoConfig

    values = shape(family)
    return AutoConfig.for_model(values.pop("model_type"), **values)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 259 tokens, which does not name a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("words")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Callable[[str], Path]:
    """Gives the folder of a family's model, as transformers saves it, with a tokenizer."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(len(family))
            model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
            model.save_pretrained(made[family])
            PreTrainedTokenizerFast.from_pretrained(words).save_pretrained(made[family])
        return made[family]

    return folder


def born(model: Model) -> Any:
    """A network born without storage, filled from the model's own source."""
    with torch.device("meta"):
        module: Any = model.skeleton()
    module.to_empty(device="cpu")
    module.tie_weights()
    weights, tensors = model.weights(seed=0), module.state_dict()
    for name in weights.shapes():
        tensors[name].copy_(weights.read(name))
    model.restore_buffers(module)
    return module


def batch(tokens: torch.Tensor) -> Batch:
    """Rows of one segment each, nothing to predict."""
    rows, length = tokens.shape
    none = torch.empty(0, dtype=torch.long)
    return Batch(
        tokens=tokens,
        positions=torch.arange(length).expand(rows, length),
        segments=torch.arange(rows)[:, None].expand(rows, length),
        parents=torch.full((rows,), -1),
        sample_of_segment=torch.arange(rows),
        part=torch.zeros(rows, dtype=torch.long),
        predict_from=none,
        target=none,
        row=none,
        sample_numbers=torch.arange(rows),
    )


def causal(batch: Batch) -> torch.Tensor:
    rows, length = batch.tokens.shape
    return torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
