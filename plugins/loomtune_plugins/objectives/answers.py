"""Rows with several answers to one prompt, as segments: the prompt once, and each answer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from loomtune.contracts import Row, Segment, Tokenizer
from loomtune.errors import Fault
from loomtune_plugins.objectives.encoding import Encoded, answered, begin, lacking, prompt
from loomtune_plugins.objectives.pairs_settings import TextSettings

PROMPT, CHOSEN, REJECTED = range(3)
"""The segments of a pair. Both answers hang on the prompt, whether its computation is shared or not."""

PAIR = ("prompt", "chosen", "rejected")
"""What they are called."""


def too_small(settings: Any) -> list[Fault]:
    """The fault of a beta that would turn preferences round, or count none."""
    if settings.beta > 0:
        return []
    return [Fault(f"objective.beta={settings.beta} prefers nothing", "set objective.beta to a number above 0")]


def probability(row: Row, named: str) -> float:
    """How likely the row's chosen answer is the better one; 1 where it does not say. named: its column, or nothing.

    Raises ValueError, in words for the user, for what is no probability.
    """
    value = row.get(named) if named else None
    if value is None:
        if named and named not in row and (meant := get_close_matches(named, list(row), n=1, cutoff=0.8)):
            raise ValueError(f"has no {named} for objective.probability, but {meant[0]}: set it to that")
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"has {value!r} as its {named}, which is no probability for objective.probability")
    return float(value)


def asked(row: Row, tokenizer: Tokenizer, settings: TextSettings) -> list[int]:
    """The tokens before every answer."""
    alone = _with(row, None)
    return prompt(alone, tokenizer, separator=settings.separator, bos=settings.bos, system=settings.system)


def compared(
    row: Row,
    tokenizer: Tokenizer,
    settings: TextSettings,
    max_length: int,
    *,
    keys: tuple[str, ...] = ("chosen", "rejected"),
    prompts: bool = False,
) -> tuple[Segment, ...]:
    """The prompt's segment, and one for each answer, each chain cut to `max_length` tokens.

    Without any target where an answer is cut off whole: such a row is left out, not compared with nothing. An answer
    to an empty prompt has nothing before its first token, which so is no target.
    keys: the row's columns of answers. prompts: whether the prompt's tokens are targets too.
    Raises ValueError, in words for the user, where an answer is missing or changes the prompt before it.
    """
    before = asked(row, tokenizer, settings)
    ids = np.array(before[:max_length], np.int32)
    segments = [Segment(ids, (np.arange(len(ids)) > 0) & prompts)]
    for key in keys:
        answer = _answer(row, key, tokenizer, settings)
        if answer.ids[: len(before)] != before:
            raise ValueError("the chat template writes the prompt otherwise once an answer follows it")
        rest = slice(len(before), max(max_length, len(before)))
        learned = np.array(answer.learned[rest], np.bool_)
        learned[:1] &= bool(before)
        segments.append(Segment(np.array(answer.ids[rest], np.int32), learned, PROMPT))
    if all(segment.is_target.any() for segment in segments[1:]):
        return tuple(segments)
    return tuple(Segment(each.tokens, np.zeros_like(each.is_target), each.parent) for each in segments)


def _answer(row: Row, key: str, tokenizer: Tokenizer, settings: TextSettings) -> Encoded:
    """The row as if it had this answer alone."""
    if key not in row:
        cure = "set data.format=unpaired" if key == "completion" else "set data.format=preference, or leave it out"
        raise lacking(row, f"no {key} answer", cure)
    alone = _with(row, row[key])
    encoded = answered(alone, tokenizer, separator=settings.separator, last_only=True, system=settings.system)
    begin(encoded, alone, tokenizer, settings.bos)
    return encoded


def _with(row: Row, answer: Any) -> Mapping[str, Any]:
    """A row of plain text or of messages, with one answer or none. A prompt of messages makes a conversation."""
    given = row.get("prompt", row.get("messages"))
    if isinstance(given, str) and not isinstance(answer, list):
        return {"prompt": given} if answer is None else {"prompt": given, "completion": answer}
    before = [{"role": "user", "content": given}] if isinstance(given, str) else list(given or ())
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer or ())
    # Some files repeat the prompt's messages in each answer.
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"messages": said if before and said[: len(before)] == before else [*before, *said], **tools}
