"""What each rank of a world does with a server, in functions that its processes find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loomtune.errors import LoomtuneError, Preempted
from loomtune.world import World
from vllm_runs import PROMPTS, SAMPLING, furthest, learn, policy, vllm

KEYS = list(range(20, 20 + len(PROMPTS)))


def _mine(world: World) -> tuple[list[Any], list[int]]:
    return PROMPTS[world.rank :: world.size], KEYS[world.rank :: world.size]


def generating(world: World, url: str, path: Path, adapter: str, sharding: str) -> list[tuple[Any, float]]:
    """Completions of this rank's prompts before and after an update, and how far they are from the policy."""
    role, rollout = policy(path, adapter, world, sharding), vllm(url)
    prompts, keys = _mine(world)
    found = []
    for _ in range(2):
        made = rollout.generate(role, prompts, keys, SAMPLING, world)
        found.append(([one.tokens for one in made], furthest(role, prompts, made)))
        learn(role)
    rollout.close()
    return found


def failing(world: World, url: str, path: Path, lost: int) -> str:
    """What a rank hears where the server that one of them asks is no more."""
    role, rollout = policy(path, "lora", world), vllm(url)
    prompts, keys = _mine(world)
    rollout.generate(role, prompts, keys, SAMPLING, world)
    if world.rank == lost:
        rollout._settings.urls, rollout._settings.patience = ["http://127.0.0.1:1"], 1.0
    try:
        rollout.generate(role, prompts, keys, SAMPLING, world)
    except LoomtuneError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def leaving(world: World, url: str, path: Path) -> str:
    """What ranks hear where the last of them is asked to leave while both wait for ever."""
    role, rollout = policy(path, "lora", world), vllm(url)
    prompts, keys = _mine(world)

    def heed() -> None:
        if world.total([world.rank == world.size - 1])[0]:
            raise Preempted("asked to leave")

    end = rollout.begin(role, prompts, keys, SAMPLING, world)
    rollout.heed = heed
    try:
        end()
    except Preempted as error:
        return str(error)
    return "nothing"
