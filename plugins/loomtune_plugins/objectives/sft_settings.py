"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class SftSettings:
    """What of a row is learned."""

    train_on: str = option("completion", "completion: answers and assistant's turns; all: every token but the first")
    turns: str = option("all", "which of the assistant's turns in a conversation: all or last")
    separator: str = option("", "text between prompt and completion, part of the prompt")
    bos: str = option("auto", "the beginning token: auto, as the tokenizer or the chat template does; always; never")
    system: str = option("", "the system prompt of conversations that have none; empty: nothing is put before them")
