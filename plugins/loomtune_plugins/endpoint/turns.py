"""Conversations as plain text, for models that know no template."""

from __future__ import annotations

from collections.abc import Sequence

from loomtune_plugins.endpoint.asking import Message

NAMES = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
NEXT = "\n\nHuman:"
"""Where an answer is over, whatever the model wrote after it."""


def plain(messages: Sequence[Message]) -> str:
    """Each turn after its speaker, as Anthropic's papers write them, and the assistant's opened."""
    turns = [f"{NAMES[one['role']]}: {one['content']}" for one in messages]
    return "\n\n".join([*turns, "Assistant:"])


def ended(text: str) -> str:
    """An answer without the turns that the model went on with."""
    return text.partition(NEXT)[0].strip()
