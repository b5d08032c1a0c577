"""What all contenders start from: rows of GSM8K, a tokenizer of 32,000 entries, one model of drawn weights."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from job import Job

from loomtune import api
from loomtune.batching import CPU_TOKENS
from loomtune.catalogue import installed
from loomtune.feed import Order

SEED = 0
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LOOMTUNE_SHARED", ROOT.parent / "shared"))
GSM8K = SHARED / "data" / "gsm8k" / "train.jsonl"
MICRO = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
"""The model of a quick run."""


def make(folder: Path, *, steps: int, batch: int, max_length: int, quick: bool) -> Job:
    """Writes everything into a folder. quick: a model of a size for tests, a few rows."""
    rows = sums(steps * batch) if quick else list(read_rows(steps * batch))
    texts = [row["prompt"] + row["completion"] for row in rows] if quick else list(_texts())
    tokenizer = make_tokenizer(folder / "tokenizer", texts, 512 if quick else 32_000)
    make_model(folder / "model", tokenizer, quick)
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "shuffled.jsonl", shuffled(rows))
    job = Job(
        model=str(folder / "model"),
        rows=str(folder / "rows.jsonl"),
        shuffled=str(folder / "shuffled.jsonl"),
        steps=steps,
        batch=batch,
        packs=packs(folder / "model", rows, batch, max_length),
        micro_tokens=CPU_TOKENS,
        max_length=max_length,
    )
    job.write(folder / "job.json")
    return job


def read_rows(count: int) -> Iterator[dict[str, str]]:
    """GSM8K's first rows, as prompt and completion. Raises FileNotFoundError saying where they were looked for."""
    if not GSM8K.is_file():
        raise FileNotFoundError(f"{GSM8K} is absent; LOOMTUNE_SHARED names the folder with data/gsm8k/train.jsonl")
    with GSM8K.open() as lines:
        for _, line in zip(range(count), lines, strict=False):
            row = json.loads(line)
            yield {"prompt": row["question"] + "\n", "completion": row["answer"]}


def sums(count: int) -> list[dict[str, str]]:
    """Rows for a quick run, made here, of very different lengths."""
    draw, rows = random.Random(SEED), []
    for _ in range(count):
        numbers = [draw.randrange(100) for _ in range(draw.randint(2, 12))]
        asked = " plus ".join(map(str, numbers))
        rows.append({"prompt": f"What is {asked}?\n", "completion": f"{asked} is {sum(numbers)}"})
    return rows


def _texts() -> Iterator[str]:
    """What the tokenizer learns from: GSM8K, and other text that lies beside it, for a vocabulary of 32,000."""
    for row in read_rows(10_000):
        yield row["prompt"] + row["completion"]
    others = [SHARED / "data" / "oasst" / "en_100_tree.jsonl", SHARED / "data" / "tinyshakespeare" / "input.txt"]
    for other in others:
        if other.is_file():
            yield from other.read_text().splitlines()


def shuffled(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows laid out so that loomtune's own order of the first epoch visits them as the others do, in sequence."""
    order, places = Order(SEED, len(rows)), [{}] * len(rows)
    for number, row in enumerate(rows):
        places[order.row(number)] = row
    return places


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(folder: Path, texts: Sequence[str], size: int) -> Path:
    """A byte-level BPE with single digits, as Llama has them, learned from texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def make_model(folder: Path, tokenizer: Path, quick: bool) -> None:
    """Draws `model=llama_35m` and saves it as Hugging Face does, so that everybody starts from the same weights."""
    from safetensors.torch import save_file

    smaller = [f"model.shape.{key}={value}" for key, value in MICRO.items()] if quick else []
    chosen = ["model=llama_35m", f"model.tokenizer={tokenizer}", *smaller]
    model = api.compose([*chosen, "data=jsonl", f"data.path={GSM8K}"]).build(installed(), "model")
    source = model.weights(SEED)
    model.save_config(folder)
    model.tokenizer().save(folder)
    save_file({name: source.read(name) for name in source.shapes()}, folder / "model.safetensors", {"format": "pt"})


def packs(model: Path, rows: Sequence[dict[str, str]], batch: int, max_length: int) -> int:
    """Packed rows of `max_length` tokens that hold about `batch` examples."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [min(max_length, len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1) for row in rows]
    return max(1, round(sum(lengths) / len(rows) * batch / max_length))
