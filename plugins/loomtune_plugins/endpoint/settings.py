"""Settings of whoever asks a language model: a stage, a reward. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loomtune.errors import Fault
from loomtune.settings import option

APIS = ("chat", "completions")
_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:\[\]?#]+)(:\d{1,5})?(/[^\s?#]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class EndpointSettings:
    """Which model is asked, and how much patience and money that may take."""

    url: str = option(
        "", "an OpenAI-compatible service, such as http://localhost:8000/v1; empty: a model on this machine"
    )
    model: str = option("", "the model's name there; without url: a folder, the folder of a run, or a hub id")
    api: str = option("chat", "chat: conversations; completions: plain text, for models without a chat template")
    key_variable: str = option(
        "LOOMTUNE_API_KEY", "variable of the environment that holds the key; unset: none is sent", how=True
    )
    body: dict[str, Any] = option({}, "more of each request as the service names it; null takes a value of ours out")
    concurrency: int = option(8, "requests that are under way at once, in each process", how=True)
    retries: int = option(6, "how often a request that failed is sent again", how=True)
    first_wait: float = option(1.0, "seconds before it is sent again, twice as many each time, less chance", how=True)
    longest_wait: float = option(
        120.0, "most seconds of such a wait; a service that asks for more has failed", how=True
    )
    connect_seconds: float = option(10.0, "most seconds until a connection stands", how=True)
    silent_seconds: float = option(120.0, "most seconds in which nothing of an answer comes", how=True)
    answer_seconds: float = option(600.0, "most seconds of a whole answer", how=True)
    input_price: float = option(0.0, "what a million tokens that are read cost, in the currency of max_cost", how=True)
    output_price: float = option(0.0, "what a million tokens that are written cost", how=True)
    max_cost: float = option(0.0, "what all answers in `cache` may cost together; 0: anything", how=True)
    cache: str = option(
        "", "folder where every answer is kept; empty: one for all, beside the cache of samples", how=True
    )
    chat_template: str = option("", "without url: as model.chat_template; empty: the model's own, or else `plain`")
    batch: int = option(16, "without url: how many answers are written at once")


_LEAST: dict[str, float] = {"concurrency": 1, "retries": 0, "first_wait": 0, "longest_wait": 0, "batch": 1}
_POSITIVE = ("connect_seconds", "silent_seconds", "answer_seconds")
_PATIENCE = ("key_variable", "concurrency", "retries", "first_wait", "longest_wait", *_POSITIVE)
_MONEY = ("input_price", "output_price", "max_cost")


def faults(settings: EndpointSettings, prefix: str) -> Iterator[Fault]:
    """Everything that is wrong with them. prefix: of the keys, such as `stage.critique`."""
    if not settings.model:
        yield Fault(f"{prefix}.model names no model", f"set {prefix}.model, and {prefix}.url where it is served")
    if settings.api not in APIS:
        yield Fault(f"{prefix}.api={settings.api} is unknown", f"set {prefix}.api to chat or completions")
    if settings.key_variable and not _VARIABLE.fullmatch(settings.key_variable):  # which may be the key: never told
        what = f"{prefix}.key_variable is no name of a variable of the environment"
        yield Fault(what, "export the key in a variable, and name that; a key in settings would be written to files")
    yield from _numbers(settings, prefix)
    yield from _places(settings, prefix)


def _numbers(settings: EndpointSettings, prefix: str) -> Iterator[Fault]:
    least = {**_LEAST, **dict.fromkeys(_MONEY, 0.0)}
    for key, low in least.items():
        if not (value := getattr(settings, key)) >= low:
            yield Fault(f"{prefix}.{key}={value} is less than {low:g}", f"set {prefix}.{key} to {low:g} or more")
    for key in _POSITIVE:
        if not (value := getattr(settings, key)) > 0:
            yield Fault(f"{prefix}.{key}={value} leaves no time", f"set {prefix}.{key} above 0")
    if settings.max_cost > 0 and not (settings.input_price or settings.output_price):
        what = f"{prefix}.max_cost counts by prices, and none is set"
        yield Fault(what, f"set {prefix}.input_price and {prefix}.output_price, per million tokens")
    if settings.max_cost > 0 and not settings.cache:
        what = f"{prefix}.max_cost is of all answers in a folder, and none is named"
        yield Fault(what, f"set {prefix}.cache to a folder of this work's own")


def _places(settings: EndpointSettings, prefix: str) -> Iterator[Fault]:
    """What only one of the two kinds of models heeds."""
    plain = EndpointSettings()
    if not settings.url:
        for key in ("body", *_MONEY, *_PATIENCE):
            if getattr(settings, key) != getattr(plain, key):
                what = f"{prefix}.{key} would be without effect: {prefix}.model is on this machine"
                yield Fault(what, f"leave it out, or set {prefix}.url")
        return
    if "@" in settings.url.partition("://")[2].partition("/")[0]:
        what = f"{prefix}.url holds a user or a password, which would be written to files"
        yield Fault(what, f"export the key in a variable, and name that by {prefix}.key_variable")
    elif not _ADDRESS.fullmatch(settings.url):
        yield Fault(f"{prefix}.url={settings.url} is no address", f"set {prefix}.url=http://HOST:PORT/v1")
    for key in ("chat_template", "batch"):
        if getattr(settings, key) != getattr(plain, key):
            what = f"{prefix}.{key} would be without effect: that is for the service at {prefix}.url to say"
            yield Fault(what, "leave it out")
