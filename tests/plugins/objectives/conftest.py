import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|endoftext|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<BOS>",
    "<EOS>",
]
TEXT = ["Question: How many are two and two? Answer: Apples and four.", "You are kind. Hi there. Hello! USER: A A A A"]

OTHERS = [
    "<think>",
    "</think>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|tool_call|>",
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
]

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
Make = Callable[..., HuggingFaceTokenizer]


def byte_level(adds_bos: str = "") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{adds_bos} $A", special_tokens=[(adds_bos, tokenizer.token_to_id(adds_bos))]
        )
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Puts a blank before each text, as the tokenizers of Llama 2 and Mistral do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_folder(folder: Path, bos: str, eos: str, template: str | None = None) -> Path:
    """A tokenizer of single bytes and of the special tokens of all families."""
    backend = Tokenizer(models.BPE({byte: number for number, byte in enumerate(sorted(ALPHABET))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, *OTHERS])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos or None, "eos_token": eos, "pad_token": "<pad>", "chat_template": template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(
        template: str = "", *, bos: str = "<s>", eos: str = "</s>", adds_bos: bool = False, pieces: bool = False
    ) -> HuggingFaceTokenizer:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        backend = sentence_piece() if pieces else byte_level(bos if adds_bos else "")
        backend.save(str(folder / "tokenizer.json"))
        names = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **{key: value for key, value in names.items() if value}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template or None}))
        return HuggingFaceTokenizer(folder)

    return make
