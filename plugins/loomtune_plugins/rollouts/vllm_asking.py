"""Completions of prompts by vLLM's `/v1/completions`: token ids there and back, never text."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from loomtune.contracts import Completion, Sampling
from loomtune.errors import UserError
from loomtune_plugins.rollouts.vllm_http import TRIES, Refused, Server, Unanswered, hang_up
from loomtune_plugins.rollouts.vllm_waiting import Stale

GENERATION_CONFIG = "start it with --generation-config vllm, so that the model's own file adds no stops and no limits"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the requests of a rollout have in common.

    model: the name that the servers know the weights by. version: of these weights, where the servers keep one.
    said: whether the log-probabilities that they give are those that a `Completion` has.
    """

    model: str
    sampling: Sampling
    said: bool
    version: str = ""

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow a prompt."""
        most = self.sampling
        return min(most.max_tokens, most.max_length - len(prompt)) if most.max_length else most.max_tokens

    def body(self, prompt: Sequence[int], key: int) -> dict[str, Any]:
        """A request; every setting that the model's own generation config might have is given, and so overruled."""
        sampling = self.sampling
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": self.room(prompt),
            "n": 1,
            "seed": key,
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k,
            "top_p": float(sampling.top_p),
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(sampling.stop),
            "ignore_eos": True,  # it is among the stops where it is one
            "min_tokens": 0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_weight_versions": True,  # vLLM 0.33; older ones pay no heed
        }


def ask_all(
    servers: Sequence[Server], asked: Asked, prompts: Sequence[Sequence[int]], keys: Sequence[int], parallel: int
) -> list[Completion]:
    """A completion of each prompt, in order; nothing is asked for one that leaves no room."""
    wanted = [number for number, prompt in enumerate(prompts) if asked.room(prompt) > 0]
    by = spread([prompts[number] for number in wanted], len(servers))
    made = [Completion(())] * len(prompts)
    pool = ThreadPoolExecutor(max(1, min(parallel, len(wanted))), "vllm")
    try:
        begun = [
            pool.submit(ask, servers[place], asked, prompts[number], keys[number])
            for number, place in zip(wanted, by, strict=True)
        ]
        for number, future in zip(wanted, begun, strict=True):
            made[number] = future.result()
    except BaseException:
        hang_up(servers)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return made


def spread(prompts: Sequence[Sequence[int]], servers: int) -> list[int]:
    """Which server gets each prompt: equal ones the same, which computes them once and keeps them."""
    turn = cycle(range(servers))
    seen: dict[tuple[int, ...], int] = {}
    return [seen[key] if (key := tuple(prompt)) in seen else seen.setdefault(key, next(turn)) for prompt in prompts]


def ask(server: Server, asked: Asked, prompt: Sequence[int], key: int) -> Completion:
    """One completion. Raises UserError where the server is not what it should be, Stale for other weights."""
    for _ in range(TRIES):
        try:
            answer = server.ask("POST", "/v1/completions", asked.body(prompt, key))
        except Refused as error:
            if error.status == 404:  # it knows neither an adapter that it was given nor a model that it had
                raise Stale(f"{server.url} says: {error}") from error
            raise
        choice = _choice(server, answer)
        if choice.get("finish_reason") != "abort":  # by who paused the server
            return _completion(server, asked, prompt, choice)
    raise Unanswered(f"{server.url} aborted a request {TRIES} times: another program pauses it")


def _choice(server: Server, answer: Any) -> dict[str, Any]:
    try:
        choice: dict[str, Any] = answer["choices"][0]
        tokens, said = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(tokens) == len(said) and all(type(token) is int for token in tokens):
            return choice
    except (KeyError, IndexError, TypeError):
        pass
    what = f"{server.url} answers a request for token ids and log-probabilities without them"
    raise UserError.of(what, "rollout=vllm needs vLLM's own server, 0.32 or newer: start `vllm serve` there")


def _completion(server: Server, asked: Asked, prompt: Sequence[int], choice: dict[str, Any]) -> Completion:
    tokens = choice["token_ids"]
    if asked.version and (wrong := {span["version"] for span in _spans(choice)} - {asked.version}):
        raise Stale(f"{server.url} generated with weights {wrong.pop()}, not {asked.version}")
    stops = [place for place in range(len(tokens)) if tokens[place] in asked.sampling.stop]
    if stops[:1] == [len(tokens) - 1] or (not stops and len(tokens) == asked.room(prompt)):
        return Completion(tuple(tokens), tuple(choice["logprobs"]["token_logprobs"]) if asked.said else ())
    what = f"{server.url} ended a completion after {len(tokens)} of {asked.room(prompt)} tokens for a reason of its own"
    raise UserError.of(f"{what} ({choice.get('finish_reason')}, {choice.get('stop_reason')})", GENERATION_CONFIG)


def _spans(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return choice.get("weight_versions") or []
