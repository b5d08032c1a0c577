"""What tests of several axes share: the folder of recorded references, a tiny model made here, rows to train on."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LOOMTUNE_SHARED", ROOT.parent / "shared"))

SHAPE: Mapping[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def shared(*parts: str) -> Path:
    """A file or folder of the shared data and references; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent; LOOMTUNE_SHARED names the folder of recorded data and references")
    return path


@contextmanager
def signals_kept() -> Iterator[None]:
    """Around a run in this process, which keeps its own answers to signals."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def byte_tokenizer(folder: Path) -> Path:
    """Saves a tokenizer of single bytes: 3 special tokens and 256 others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, tied: bool = False) -> Path:
    """Saves a Llama of two layers with drawn weights, in the layout of Hugging Face, with a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).save_pretrained(folder)
    return byte_tokenizer(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path


def mixed_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions of very different lengths (5 to 80 bytes) that a small model can begin to learn."""
    draw = random.Random(seed)
    words = ["loom", "warp", "weft", "heddle", "shuttle", "reed", "bobbin", "selvage"]
    rows = []
    for _ in range(count):
        chosen = draw.choices(words, k=draw.choice([1, 1, 2, 3, 6]))
        rows.append({"prompt": f"{' '.join(chosen)}? ", "completion": " ".join(word[::-1] for word in chosen)})
    return rows
