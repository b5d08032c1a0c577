"""Rows of GSM8K as prompt and completion."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from material import GSM8K, SEED, Rows, lines


def read(count: int) -> Iterator[dict[str, str]]:
    """The first rows. Raises FileNotFoundError saying where they were looked for."""
    for row in islice(lines(GSM8K), count):
        yield {"prompt": row["question"] + "\n", "completion": row["answer"]}


def sums(count: int) -> list[dict[str, str]]:
    """Rows for a quick run, made here, of very different lengths."""
    draw, rows = random.Random(SEED), []
    for _ in range(count):
        numbers = [draw.randrange(100) for _ in range(draw.randint(2, 12))]
        asked = " plus ".join(map(str, numbers))
        rows.append({"prompt": f"What is {asked}?\n", "completion": f"{asked} is {sum(numbers)}"})
    return rows


def packs(model: Path, rows: Rows, batch: int, max_length: int) -> int:
    """Packed rows of `max_length` tokens that hold about `batch` examples."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [min(max_length, len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1) for row in rows]
    return max(1, round(sum(lengths) / len(rows) * batch / max_length))
