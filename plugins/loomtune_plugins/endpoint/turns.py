"""Conversations as plain text, for models that know no template."""

from __future__ import annotations

from collections.abc import Sequence

from loomtune_plugins.endpoint.asking import Message

NAMES = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
NEXT = "\n\nHuman:"
"""Where an answer is over, whatever a model wrote after it."""

OTHER = "\n\nUser:"
"""The same by the template `plain`."""


def told(messages: Sequence[Message]) -> str:
    """Each turn after its speaker, as Anthropic's papers write them."""
    return "\n\n".join(f"{NAMES[one['role']]}: {one['content']}" for one in messages)


def plain(messages: Sequence[Message], opening: str = "") -> str:
    """The same with the assistant's next turn begun."""
    return f"{told(messages)}\n\nAssistant:{' ' if opening else ''}{opening}"


def ended(text: str) -> str:
    """An answer without the turns that the model went on with."""
    return text.partition(NEXT)[0].partition(OTHER)[0].strip()
