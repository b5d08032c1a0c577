"""What is found out about a server, once, before it is asked for anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loomtune.contracts import Model, Sampling
from loomtune.errors import Fault, UserError
from loomtune_plugins.rollouts.vllm_http import Refused, Server

OLDEST = (0, 32)
"""The first version whose answers were looked at; weights of older ones are pushed otherwise."""

WORDS = "The quick brown fox, 0123456789!"
"""What both tokenizers are to make the same of."""

SOME = 8
"""Tokens of it, after which a server is asked for one more; any server has room for so many."""


@dataclass(frozen=True, slots=True)
class Met:
    """A server as it was found.

    model: the name of what it serves. longest: of prompt and completion, in tokens. divides: whether its
    log-probabilities are of logits divided by the temperature, after what was cut off (`processed_logprobs`).
    dtype: torch's name of the type of its weights. backend: of its weight transfer. Both empty, and `develops` False,
    where it does not say.
    """

    model: str
    longest: int
    divides: bool
    develops: bool = False
    dtype: str = ""
    backend: str = ""


def meet(server: Server, model: Model) -> Met:
    """Waits until a server is up, and looks whether it can serve this model.

    Raises UserError with all that is wrong, Unanswered where it does not come up in time.
    """
    server.ask("GET", "/health")
    _check_version(server)
    served, longest = _served(server)
    if faults := [*_vocabulary(server, served, model.vocabulary()), *_words(server, served, model)]:
        raise UserError(*faults)
    config = _config(server)
    return Met(
        model=served,
        longest=longest,
        divides=_divides(server, served, model.tokenizer().encode(WORDS)[:SOME]),
        develops=bool(config),
        dtype=str(config.get("model_config", {}).get("dtype", "")).removeprefix("torch."),
        backend=(config.get("weight_transfer_config") or {}).get("backend", ""),
    )


def _check_version(server: Server) -> None:
    try:
        version = str(server.ask("GET", "/version")["version"])
    except (Refused, TypeError, KeyError) as error:
        cure = "start `vllm serve` there; rollout.urls names the server itself, without /v1"
        raise UserError.of(f"{server.url} does not say which vLLM it is", cure) from error
    numbers = re.match(r"(\d+)\.(\d+)\.\d", version)
    if numbers and OLDEST > (int(numbers[1]), int(numbers[2])) > (0, 1):  # 0.1.dev is built from source
        oldest = ".".join(map(str, OLDEST))
        raise UserError.of(f"{server.url} is vLLM {version}", f"install vllm>={oldest} where it runs")


def _served(server: Server) -> tuple[str, int]:
    """Name and longest sequence of the model itself; adapters have a parent."""
    for card in server.ask("GET", "/v1/models")["data"]:
        if not card.get("parent"):
            return card["id"], int(card["max_model_len"])
    raise UserError.of(f"{server.url} serves no model", "start `vllm serve MODEL` there")


def _try(server: Server, model: str, **more: Any) -> Any:
    body = {"model": model, "prompt": [0], "max_tokens": 1, "logprobs": 1, "ignore_eos": True, "seed": 0}
    return server.ask("POST", "/v1/completions", body | more)


def _vocabulary(server: Server, served: str, size: int) -> list[Fault]:
    """vLLM refuses what names a token that the model does not have: so its rows are counted without being told."""
    try:
        _try(server, served, allowed_token_ids=[size - 1])
    except Refused as error:
        return [_other(server, f"has no token {size - 1}, which is the last of model.path's ({error})")]
    try:
        _try(server, served, allowed_token_ids=[size])
    except Refused:
        return []
    return [_other(server, f"has more tokens than the {size} of model.path")]


def _words(server: Server, served: str, model: Model) -> list[Fault]:
    body = {"model": served, "prompt": WORDS, "add_special_tokens": False}
    try:
        theirs = server.ask("POST", "/tokenize", body)["tokens"]
    except (Refused, KeyError, TypeError):
        return []  # it was started without a tokenizer, or without this endpoint
    if theirs == (ours := model.tokenizer().encode(WORDS)):
        return []
    return [_other(server, f"makes other tokens of a text ({theirs[:4]}...) than model.path ({ours[:4]}...)")]


def _other(server: Server, what: str) -> Fault:
    cure = "start `vllm serve` with the model that model.path names, or set model.path to what is served"
    return Fault(f"the model of {server.url} {what}", cure)


def _divides(server: Server, served: str, prompt: Sequence[int]) -> bool:
    """Whether the likeliest token's log-probability hangs on the temperature, after a prompt of some tokens: the first
    token of all may be a padding of zeros, after which all are as likely."""
    cold, hot = (
        max(_try(server, served, prompt=prompt, temperature=at)["choices"][0]["logprobs"]["top_logprobs"][0].values())
        for at in (0.5, 2.0)
    )
    return bool(abs(cold - hot) > 1e-6 * (1 + abs(hot)))


def _config(server: Server) -> Any:
    """The whole configuration, as servers in development mode give it; nothing from others."""
    try:
        return server.ask("GET", "/server_info?config_format=json")["vllm_config"]
    except Refused:
        return {}


def suits(servers: Sequence[Server], met: Sequence[Met], sampling: Sampling, longest: int) -> bool:
    """Whether what the servers give as log-probabilities is what a `Completion` has.

    longest: of these prompts with their completions, in tokens. Raises UserError where a server cannot draw so.
    """
    faults, said = [], True
    for server, one in zip(servers, met, strict=True):
        if longest > one.longest:
            what = f"{server.url} takes {one.longest} tokens of prompt and completion, and {longest} are asked for"
            faults.append(Fault(what, f"start it with --max-model-len {longest}, or set max_length lower"))
        cuts = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)
        plain = sampling.temperature in (0.0, 1.0)
        if not (plain or one.divides):
            what = f"{server.url} gives log-probabilities of undivided logits, and the temperature is"
            cure = "start it with --logprobs-mode processed_logprobs, or set the temperature to 1"
            faults.append(Fault(f"{what} {sampling.temperature:g}", cure))
        said = said and not (cuts and one.divides)
    if faults:
        raise UserError(*faults)
    return said


def settled(server: Server) -> str:
    """The version of the weights that a server in development mode has."""
    return str(server.ask("GET", "/weight_info")["weight_version"])
