"""What all contenders start from: a tokenizer of 32,000 entries, one model of drawn weights, rows in a known order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from job import Job

from loomtune import api
from loomtune.catalogue import installed
from loomtune.order import Order, Share

SEED = 0
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LOOMTUNE_SHARED", ROOT.parent / "shared"))
GSM8K = SHARED / "data" / "gsm8k" / "train.jsonl"
OASST = SHARED / "data" / "oasst" / "en_100_tree.jsonl"
MICRO = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
"""The model of a quick run."""
Rows = Sequence[dict[str, str]]


def start(folder: Path, texts: Iterable[str], *, quick: bool) -> Path:
    """Makes a tokenizer of these texts and a model for it; gives their folder. quick: of a size for tests."""
    make_tokenizer(folder / "tokenizer", texts, 512 if quick else 32_000)
    make_model(folder / "model", folder / "tokenizer", quick)
    return folder / "model"


def job(folder: Path, model: Path, rows: Rows, **others: Any) -> Job:
    """Writes the rows, and what is to be done with them. others: of the job."""
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "shuffled.jsonl", shuffled(rows))
    given = {"rows": str(folder / "rows.jsonl"), "shuffled": str(folder / "shuffled.jsonl")}
    made = Job(model=str(model), **given, **others)
    made.write(folder / "job.json")
    return made


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises FileNotFoundError saying where it was looked for."""
    if not file.is_file():
        where = Path(*file.parts[-3:])
        raise FileNotFoundError(f"{file} is absent; LOOMTUNE_SHARED names the folder with {where}")
    with file.open() as opened:
        yield from map(json.loads, opened)


def texts() -> Iterator[str]:
    """What the tokenizer learns from: GSM8K, and other text that lies beside it, for a vocabulary of 32,000."""
    yield from (f"{row['question']}\n{row['answer']}" for row in lines(GSM8K))
    for other in (OASST, SHARED / "data" / "tinyshakespeare" / "input.txt"):
        if other.is_file():
            yield from other.read_text().splitlines()


def shuffled(rows: Rows) -> Rows:
    """The rows laid out so that loomtune's own order of the first epoch visits them as the others do, in sequence."""
    order, places = Order(SEED, (Share("", len(rows), Fraction(len(rows))),)), [dict[str, str]()] * len(rows)
    for place, row in zip(order.rows(0, len(rows)), rows, strict=True):
        places[place] = row
    return places


def write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(folder: Path, texts: Iterable[str], size: int) -> Path:
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
