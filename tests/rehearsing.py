"""A model small enough to count by hand, planned."""

from __future__ import annotations

from loomtune import api
from loomtune.plan import Plan

WIDTH, INNER, VOCABULARY, BLOCKS, LENGTH = 64, 128, 320, 3, 32

SHAPE = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 4, "
    "num_key_value_heads: 4, vocab_size: 320, max_position_embeddings: 64, tie_word_embeddings: false}"
)


def planned(*words: str) -> Plan:
    """Eight rows a step, of data that nobody reads."""
    fixed = ["model=random", f"model.shape={SHAPE}", "data=jsonl", "data.path=nowhere.jsonl", f"max_length={LENGTH}"]
    return api.compose([*fixed, "batch.size=8", *words])
