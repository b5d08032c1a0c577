"""One template, read once, and what it makes of a conversation."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from loomtune_plugins.models.templates_budget import Forbidden
from loomtune_plugins.models.templates_sandbox import Sandbox

LONGEST = 2**17
"""Characters of a template; the longest that are published have a fifth of it."""

DEEPEST = 64
"""Lists and objects within each other; a macro that calls itself for each takes eight calls of Python."""

REASONING = ("reasoning_content", "thinking", "reasoning")
SEVERAL = 16
"""Templates that are kept."""


class Rendering:
    """A template, read once, for one thread. Raises TemplateError, or what Python raises, where it cannot be."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise Forbidden(f"it is longer than {LONGEST} characters")
        self._sandbox = Sandbox()
        self._template = self._sandbox.from_string(text)

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        reply: bool,
        special: Mapping[str, str],
    ) -> str:
        """What it writes. special: the names of tokens, as it may call them, to the tokens."""
        said, schemas = [_heard(plain(message)) for message in messages], plain(tools) or None
        known = {"messages": said, "tools": schemas, "documents": None, "add_generation_prompt": reply}
        self._sandbox.budget.begin([said, schemas])
        return self._sandbox.concat(self._template.root_render_func(self._template.new_context({**special, **known})))


def _heard(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is nothing, with its reasoning where templates look for it, whatever name it came by."""
    if None in message.values():
        message = {key: value for key, value in message.items() if value is not None}
    for name in REASONING:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


class _Renderings(threading.local):
    """Of one thread."""

    def __init__(self) -> None:
        self.known: dict[str, Rendering] = {}


_renderings = _Renderings()


def rendering(template: str) -> Rendering:
    """A template, read when a thread first asks for it."""
    known = _renderings.known
    if template not in known:
        if len(known) >= SEVERAL:
            known.clear()
        known[template] = Rendering(template)
    return known[template]


def plain(value: Any, depth: int = 0) -> Any:
    """A value of exact JSON types, so that a template meets no object with methods of its own.

    Raises TemplateError for one so deep that writing it would take more of Python's stack than there may be.
    """
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or type(value) in (int, float, bool):
        return value
    if depth > DEEPEST:
        raise TemplateError(f"it holds lists and objects within each other, more than {DEEPEST} deep")
    if isinstance(value, Mapping):
        return {plain(key): plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, depth + 1) for one in value]
    if hasattr(value, "tolist"):  # numpy's, as columns of Parquet give them
        return plain(value.tolist(), depth + 1)
    return f"<{type(value).__name__}>"
