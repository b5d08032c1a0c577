"""How a model of this machine is asked: by its chat template, in plain text, or in the form that a run learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from loomtune.catalogue import installed
from loomtune.contracts import Objective, Row, Tokenizer
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_plugins.endpoint.asking import Ask, Message
from loomtune_plugins.endpoint.turns import plain, told

Prompts = Callable[[Ask], list[int]]
"""From a question to the ids that the answer is to follow."""


def prompts(path: str, api: str, tokenizer: Tokenizer) -> Prompts:
    """Of the model at a path. A run's is asked as `loomtune chat` asks it, unless it is to be plain text."""
    folder = Path(path).expanduser()
    if api == "chat" and (folder / "run.yaml").is_file():
        return _as_learned(folder, tokenizer)

    def of_text(ask: Ask) -> list[int]:
        if api == "completions":
            return _begun(plain(ask.messages, ask.opening), tokenizer)
        return _begun(tokenizer.render(list(ask.messages), reply=True) + ask.opening, tokenizer)

    return of_text


def _begun(text: str, tokenizer: Tokenizer) -> list[int]:
    """Its ids, begun as servers begin them."""
    ids, bos = tokenizer.encode(text), tokenizer.bos_id
    return [bos, *ids] if bos is not None and tokenizer.adds_bos and ids[:1] != [bos] else ids


def _as_learned(folder: Path, tokenizer: Tokenizer) -> Prompts:
    plan = Plan.load(folder)
    objective: Objective = plan.build(installed(), "objective")
    converses = "messages" in (first := _first(plan)) or not isinstance(first.get("prompt", ""), str)
    if not first:
        converses = bool(tokenizer.template)

    def of_row(ask: Ask) -> list[int]:
        ids = objective.prompt(_row(ask.messages, converses), tokenizer)
        return [*ids, *tokenizer.encode(ask.opening)] if ask.opening else ids

    return of_row


def _first(plan: Plan) -> Row:
    """The first row that the run learned from; nothing where that is gone."""
    try:
        return next(iter(plan.build(installed(), "data").rows("train")), {})
    except (UserError, OSError):
        return {}


def _row(turns: Sequence[Message], converses: bool) -> Row:
    """A question as a row, with an answer that only marks where the model's begins."""
    if converses:
        return {"messages": [*map(dict, turns), {"role": "assistant", "content": "."}]}
    asked = turns[0]["content"] if len(turns) == 1 else told(turns)
    return {"prompt": asked, "completion": "."}
