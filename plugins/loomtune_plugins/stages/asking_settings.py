"""Settings of the stages that ask a language model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from loomtune.settings import option
from loomtune_plugins.endpoint import EndpointSettings

CUTS = ("drop", "keep")
FAILURES = ("stop", "drop")
_ASKED = ("url", "model", "api", "body", "chat_template")
"""Which model it is, and what is sent to it: all that decides what it says."""

ASIDE = tuple(entry.name for entry in fields(EndpointSettings) if entry.name not in _ASKED)
"""Settings that change nothing about rows: patience, money and where answers are kept."""


@dataclass
class AskingSettings(EndpointSettings):
    """How answers are drawn, and what becomes of rows without one."""

    seed: int = option(0, "of everything that is drawn for a row")
    max_tokens: int = option(512, "most tokens of an answer")
    temperature: float = option(1.0, "of answers; 0: always the likeliest token")
    top_p: float = option(1.0, "share of the likeliest tokens among which answers are drawn")
    cut: str = option("drop", "rows with an answer that was cut at max_tokens: drop or keep")
    failures: str = option("stop", "where a question stays without an answer after all attempts: stop, or drop its row")


@dataclass
class AnswerSettings(AskingSettings):
    """How many answers a prompt gets."""

    count: int = option(1, "answers to each prompt: 1 makes a completion, 2 make a pair that `principled` can judge")


@dataclass
class CritiqueSettings(AskingSettings):
    """By what answers are criticised, and how often."""

    constitution: str = option("", "a YAML file of principles; empty: the one that is shipped")
    rounds: int = option(4, "critiques and revisions of each answer, one after the other")


@dataclass
class PrincipledSettings(AskingSettings):
    """By what the better of two answers is chosen."""

    constitution: str = option("", "a YAML file of principles; empty: the one that is shipped")
    thinks: bool = option(False, "have the model think step by step before it chooses")
    clamp: float = option(0.4, "with thinks, the least probability, and the most is 1 less it; 0: as the model says")
