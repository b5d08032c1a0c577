"""Pairs of ranked replies from OpenAssistant's trees, as plain text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from material import OASST, SEED, Rows, lines

from loomtune import api
from loomtune.catalogue import installed

Wanted = Callable[[int, int, int], bool]
NAMES = {"user": "User", "assistant": "Assistant"}


def pairs(count: int, model: Path, max_length: int, wanted: Wanted) -> Rows:
    """Pairs drawn from those wanted. Raises FileNotFoundError saying where they were looked for.

    Left out are those whose prompt leaves no room for an answer, and those in which a token straddles the end of the
    prompt, which trainers cut differently. wanted: by the tokens of prompt and answers, cut to a row.
    """
    next(lines(OASST))
    data = api.compose(["data=oasst", f"data.path={OASST}"]).build(installed(), "data")
    found = [as_text(row) for row in data.rows("train")]
    random.Random(SEED).shuffle(found)
    lengths = Lengths(model, max_length)
    return [row for row in found if (sizes := lengths(row)) and wanted(*sizes)][:count]


def as_text(row: Any) -> dict[str, str]:
    """The conversation as plain text, up to where the assistant is asked, and both answers."""
    turns = "".join(f"{NAMES[turn['role']]}: {turn['content'].strip()}\n" for turn in row["prompt"])
    answers = {
        key: row[key] if isinstance(row[key], str) else row[key][-1]["content"] for key in ("chosen", "rejected")
    }
    return {"prompt": f"{turns}Assistant:\n", **{key: answer.strip() for key, answer in answers.items()}}


class Lengths:
    """Tokens of a pair's prompt and of its answers, as far as a row holds them; none where it is left out."""

    def __init__(self, model: Path, max_length: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer, self.max_length = AutoTokenizer.from_pretrained(model), max_length

    def __call__(self, row: dict[str, str]) -> tuple[int, ...]:
        asked = self._ids(row["prompt"])
        whole = [self._ids(row["prompt"] + row[key]) for key in ("chosen", "rejected")]
        if len(asked) >= self.max_length or any(ids[: len(asked)] != asked for ids in whole):
            return ()
        return len(asked), *(min(self.max_length, len(ids) + 1) - len(asked) for ids in whole)

    def _ids(self, text: str) -> Sequence[int]:
        found: Sequence[int] = self.tokenizer(text)["input_ids"]
        return found


def made_up(count: int) -> Rows:
    """Pairs for a quick run, made here: a right sum and a wrong one, after prompts of very different lengths."""
    draw = random.Random(SEED)
    return [dict(zip(("prompt", "chosen", "rejected"), _sum(draw), strict=True)) for _ in range(count)]


def _sum(draw: random.Random) -> Iterator[str]:
    numbers = [draw.randrange(100) for _ in range(draw.randint(2, 20))]
    yield f"What is {' plus '.join(map(str, numbers))}?\n"
    yield f"It is {sum(numbers)}."
    yield f"That makes {sum(numbers) + draw.randint(1, 9)}, I think."
