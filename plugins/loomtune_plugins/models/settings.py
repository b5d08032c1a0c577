"""Settings of the models axis; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loomtune.settings import option

ATTENTION = "attention of transformers: sdpa, eager, flash_attention_2, ...; empty: what the model prefers"
CHAT_TEMPLATE = "in place of the tokenizer's chat template: a Jinja file, or chatml, llama3, ...; plain needs no tokens"
NEW_TOKENS = "special tokens to add to the tokenizer; the embedding grows where it has no spare rows for them"
ORIGIN = "hub ids of models of this very shape, for which `loomtune plan` takes it where they are not at hand"
PAD_VOCABULARY = "the embedding's rows become a multiple of this; 64 suits accelerators, and what ranks divide"


@dataclass
class HuggingFaceSettings:
    """A model in the format of Hugging Face."""

    path: str = option("", "a folder, the folder of a run, or a hub id; empty: the model that is shipped")
    checkpoint: str = option("latest", "which checkpoint, where `path` is a run: `latest` or `best`")
    revision: str = option("", "branch, tag or commit, where `path` is a hub id")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    attention: str = option("", ATTENTION)
    chat_template: str = option("", CHAT_TEMPLATE)
    tokenizer: str = option("", "folder of another tokenizer; empty: the model's own")
    new_tokens: list[str] = option([], NEW_TOKENS)
    pad_vocabulary_to: int = option(1, PAD_VOCABULARY)


@dataclass
class TinySettings:
    """The shipped model."""

    attention: str = option("", ATTENTION)
    chat_template: str = option("", CHAT_TEMPLATE)
    new_tokens: list[str] = option([], NEW_TOKENS)
    pad_vocabulary_to: int = option(1, PAD_VOCABULARY)


@dataclass
class RandomSettings:
    """An architecture without a checkpoint."""

    config: str = option("", "a `config.json` or its folder; `shape` overrides single values of it")
    shape: dict[str, Any] = option({}, "arguments of the transformers config, `model_type` among them")
    attention: str = option("", ATTENTION)
    chat_template: str = option("", CHAT_TEMPLATE)
    tokenizer: str = option("", "folder of a tokenizer; empty: that of `config`, or else of the shipped model")
    new_tokens: list[str] = option([], NEW_TOKENS)
    pad_vocabulary_to: int = option(1, PAD_VOCABULARY)
    origin: list[str] = option([], ORIGIN, how=True)
