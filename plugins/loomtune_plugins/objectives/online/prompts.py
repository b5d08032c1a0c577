"""Rows as prompts: the very tokens that a model trained on such rows was asked with."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from loomtune.contracts import Row, Sample, Segment, Tokenizer
from loomtune_plugins.objectives.answers import asked
from loomtune_plugins.objectives.encoding import lacking
from loomtune_plugins.objectives.pairs_settings import TextSettings

VERSION = 1
"""Part of the fingerprint: raise it when the same row gives other tokens."""


def prompt(row: Row, tokenizer: Tokenizer, settings: TextSettings) -> list[int]:
    """The tokens before a row's answer, whatever else the row has.

    Raises ValueError, in words for the user, where it has no prompt, or one without any token.
    """
    if "messages" not in row and "prompt" not in row:
        raise lacking(row, "no prompt and no messages, so nothing that could be answered", "set data.prompt=<column>")
    if not isinstance(row.get("prompt", row.get("messages")), str | list):
        raise ValueError("has no text as its prompt, nor a conversation")
    found = asked(row, tokenizer, settings)
    if not found:
        raise ValueError("has an empty prompt, and nothing is generated from nothing: objective.bos=always mends that")
    return found


def sample(tokens: list[int], max_length: int) -> Sample:
    """A prompt as a sample without targets, cut at the end: one that is cut leaves no room for an answer."""
    ids = np.array(tokens[:max_length], np.int32)
    return Sample((Segment(ids, np.zeros(len(ids), np.bool_)),))


def fingerprint(settings: TextSettings) -> str:
    """Digest of the settings that decide on tokens: one objective's samples are the other's."""
    kept = [settings.separator, settings.bos, settings.system]
    return hashlib.sha256(json.dumps(["prompts", VERSION, *kept]).encode()).hexdigest()
