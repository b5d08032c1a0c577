"""Settings of the objectives that learn from scored completions, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from loomtune.errors import Fault
from loomtune.settings import option
from loomtune_plugins.objectives.encoding import BOS, unknown
from loomtune_plugins.objectives.pairs_settings import TextSettings

ESTIMATORS = ("k1", "k2", "k3")
"""Schulman 2020, "Approximating KL divergence": of x = log p_ref - log p they are -x, x^2/2 and exp(x) - x - 1."""


@dataclass
class OnlineSettings(TextSettings):
    """What is drawn of each prompt, and how often it is learned from."""

    group: int = option(8, "completions of each prompt")
    max_new_tokens: int = option(256, "longest completion, in tokens")
    temperature: float = option(1.0, "of sampling; log-probabilities are those of logits divided by it")
    top_k: int = option(0, "draw among so many likeliest tokens; 0: among all")
    top_p: float = option(1.0, "draw among the likeliest tokens that have this probability together; 1: among all")
    epochs: int = option(1, "how often a batch of completions is gone through")
    minibatches: int = option(1, "optimizer steps of one pass through a batch: its prompts are dealt out to them")
    mask_truncated: bool = option(False, "learn nothing of completions that were cut at their longest")


def sampling_faults(settings: Any) -> Iterator[Fault]:
    """What is wrong with how completions are drawn and gone through."""
    yield from unknown(settings, bos=BOS)
    for key in ("group", "max_new_tokens", "epochs", "minibatches"):
        if (value := getattr(settings, key)) < 1:
            yield Fault(f"objective.{key}={value} is less than 1", f"set objective.{key} to at least 1")
    if settings.temperature <= 0:
        what = f"objective.temperature={settings.temperature:g} draws nothing: all completions of a prompt are the same"
        yield Fault(what, "set objective.temperature above 0")
    if settings.top_k < 0:
        yield Fault(f"objective.top_k={settings.top_k} is negative", "set objective.top_k to 0 (all tokens) or more")
    if not 0 < settings.top_p <= 1:
        what = f"objective.top_p={settings.top_p:g} is no share of the probability"
        yield Fault(what, "set objective.top_p above 0 and at most 1")


def without_effect(settings: Any, keys: tuple[str, ...], because: str, cure: str) -> Iterator[Fault]:
    """A fault of each of the keys that is set, though `because` makes nothing of it."""
    defaults = {field.name: field.default for field in fields(settings)}
    for key in keys:
        if (value := getattr(settings, key)) != defaults[key]:
            said = str(value).lower() if isinstance(value, bool) else value
            yield Fault(f"objective.{key}={said} has no effect with {because}", f"leave objective.{key} out, or {cure}")
