"""What a run's rollout engine makes of prompts, on the processes and in the layout of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loomtune.contracts import Sampling
from loomtune.world import World
from runs.ranks import assembled

VOCABULARY = 256
"""Of the prompts; the models know more."""


def prompts(count: int) -> list[list[int]]:
    """Of 2 to 40 tokens; every fourth is as the one before it."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    drawn = [[1, *torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()] for length in lengths]
    return [drawn[number - 1] if number % 4 == 3 else prompt for number, prompt in enumerate(drawn)]


def keys(count: int) -> list[int]:
    return [2**62 - 1000 * number for number in range(count)]


def sampling(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=1.0, stop=(2,))


def rolled(folder: Path, world: World) -> dict[str, Any]:
    """64 completions of 64 tokens at temperature 1, with their log-probabilities."""
    return _rolled(folder, world, 64, 64)


def rolled_few(folder: Path, world: World) -> dict[str, Any]:
    """16 of 24."""
    return _rolled(folder, world, 16, 24)


def _rolled(folder: Path, world: World, count: int, tokens: int) -> dict[str, Any]:
    assembly = assembled(world, folder)
    assembly.build_roles()
    drawn = assembly.run.begin(prompts(count), keys(count), sampling(tokens))()
    for role in assembly.run.roles.values():
        role.engine.close()
    return {"metrics": {}, "drawn": [(list(one.tokens), list(one.log_probs)) for one in drawn]}
