"""What a service sent, read with suspicion: whatever is no answer says why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loomtune_plugins.endpoint.asking import Ask, Reply
from loomtune_plugins.endpoint.turns import ended, plain

CHARACTERS = 3
"""Of a token, about: how many were read and written where a service does not say it."""


class Unusable(Exception):
    """The service answered, and this is no answer.

    lasting: whether it would answer the same again. tokens: what it was paid for.
    """

    def __init__(self, why: str, *, lasting: bool = False, tokens: tuple[int, int] = (0, 0)) -> None:
        super().__init__(why)
        self.lasting, self.tokens = lasting, tokens


def reply_of(body: bytes, ask: Ask) -> Reply:
    """The reply in a body that came with status 200. Raises Unusable."""
    told = _parsed(body)
    tokens = _tokens(told.get("usage"), ask, body)
    try:
        return _read(told, ask, tokens)
    except Unusable as found:
        raise Unusable(str(found), lasting=found.lasting, tokens=tokens) from found
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"an answer of another form ({type(error).__name__}: {error})", tokens=tokens) from error


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"no JSON came ({str(error)[:100]})") from error
    if not isinstance(told, dict):
        raise Unusable(f"JSON of a {type(told).__name__} came, and no answer")
    if said := told.get("error"):
        raise Unusable(f"an error came as an answer ({message_of(body) or str(said)[:100]})")
    return told


def _tokens(usage: Any, ask: Ask, body: bytes) -> tuple[int, int]:
    """(read, written) as reported; by the length of the text where nothing is."""
    told = usage if isinstance(usage, dict) else {}
    counts = [told.get("prompt_tokens"), told.get("completion_tokens")]
    guessed = [len(plain(ask.messages)) // CHARACTERS, len(body) // CHARACTERS]
    read, written = (
        count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 40 else guess
        for count, guess in zip(counts, guessed, strict=True)
    )
    return read, written


def _read(told: Mapping[str, Any], ask: Ask, tokens: tuple[int, int]) -> Reply:
    choices = told["choices"]
    if not choices:
        raise Unusable("an answer without choices came")
    choice = choices[0]
    if choice.get("finish_reason") == "content_filter":
        raise Unusable("the service's filter holds the answer back", lasting=True)
    if ask.options:
        return Reply(log_probs=options(_shown(choice), ask.options), tokens=tokens)
    text = _text(choice).encode("utf-8", "replace").decode()
    if not text:
        raise Unusable("an empty answer came", lasting=True)
    return Reply(text=text, ended=choice.get("finish_reason") != "length", tokens=tokens)


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    if message is None:
        return ended(choice["text"])
    said = message.get("content") or message.get("refusal") or ""
    if isinstance(said, list):  # in parts
        said = "".join(part["text"] for part in said if part.get("type") == "text")
    if not isinstance(said, str):
        raise TypeError(f"the text is a {type(said).__name__}")
    return said.strip()


def _shown(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likeliest first tokens, and the log-probability of each, as either kind of API has them."""
    told = choice.get("logprobs")
    if not told:
        raise Unusable("no log-probabilities came: the service has none for this model", lasting=True)
    if "content" in told:
        return [(one["token"], float(one["logprob"])) for one in told["content"][0]["top_logprobs"]]
    return [(token, float(value)) for token, value in told["top_logprobs"][0].items()]


def options(shown: Sequence[tuple[str, float]], wanted: Sequence[str]) -> dict[str, float]:
    """Log-probability of each option: of all tokens that are it, blanks and brackets aside. Raises Unusable.

    One that is not among the likeliest is at most as likely as the last of these, which is what it is given.
    """
    if any(math.isnan(value) or value == math.inf for _, value in shown):
        raise Unusable("a log-probability is no number")
    shown = [(token, value) for token, value in shown if value > -math.inf]  # two impossible ones are no choice
    found: dict[str, float] = {}
    for token, value in shown:
        if (option := token.strip(" \n\t\u0120\u2581()")) in wanted:
            found[option] = _sum(found.get(option, -math.inf), value)
    if not found:
        raise Unusable(f"the answer begins with none of {', '.join(wanted)}", lasting=True)
    least = min(value for _, value in shown)
    return {option: found.get(option, least) for option in wanted}


def _sum(one: float, other: float) -> float:
    """log(e^one + e^other)."""
    high, low = max(one, other), min(one, other)
    return high if math.isinf(low) else high + math.log1p(math.exp(low - high))


def message_of(body: bytes) -> str:
    """What an error says of itself, cut to a line."""
    try:
        told = json.loads(body)
        error = told.get("error", told) if isinstance(told, dict) else told
        said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        said = body.decode("utf-8", "replace")
    return " ".join(str(said or "").split())[:300]
