"""How transformers is made to continue prompts with the weights that are being trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from loomtune.contracts import Completion, Role, Sampling
from loomtune.world import World
from loomtune_plugins.rollouts.noise import RowNoise


def generate(
    role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World, batch: int
) -> list[Completion]:
    """Completions of this rank's prompts, in order, `batch` of similar length at once."""
    completions = [Completion(())] * len(prompts)
    with role.engine.evaluating(), role.engine.gathered() as module, _own_defaults(module), torch.no_grad():
        for chosen, room in _batches(prompts, sampling, batch):
            longest = len(prompts[chosen[-1]])
            noise = RowNoise([keys[i] for i in chosen], longest)
            most = replace(sampling, max_tokens=room)
            done = _continued(module, [prompts[i] for i in chosen], most, noise, world.device)
            for i, tokens in zip(chosen, done, strict=True):
                completions[i] = Completion(tokens)
    return completions


def _batches(prompts: Sequence[Sequence[int]], sampling: Sampling, size: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of at most `size` prompts of similar length, and how many tokens each of these has room for.

    Prompts near the end of `max_length` go with others of their own length: in a batch with shorter ones they would be
    computed at positions that the model does not have. Those without any room are in none.
    """
    rooms = [_room(len(prompt), sampling) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for room, group in groupby(by_length, key=rooms.__getitem__):
        numbers = list(group) if room > 0 else []
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size], room


def _room(length: int, sampling: Sampling) -> int:
    return min(sampling.max_tokens, sampling.max_length - length) if sampling.max_length else sampling.max_tokens


def _continued(
    module: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: RowNoise, device: torch.device
) -> list[list[int]]:
    """Completions of one batch of prompts."""
    tokens, mask = _left_padded(prompts, device)
    made = module.generate(
        input_ids=tokens,
        attention_mask=mask,
        generation_config=_config(sampling),
        logits_processor=noise.processors(sampling),
    )
    return [_until_stop(row, sampling.stop) for row in made[:, tokens.shape[1] :].tolist()]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`(rows, length)` tokens and mask. What pads is masked, so that any token will do."""
    length = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


def _config(sampling: Sampling) -> Any:
    """What generate needs to know. Choosing is greedy always: the noise of sampling is added to the scores."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(sampling.stop) or None,
        pad_token_id=0,
    )


def _until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """The tokens up to the first stop token, which stays; what follows is padding."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop), tokens)


@contextmanager
def _own_defaults(module: Any) -> Iterator[None]:
    """Sets aside the model's generation settings, which transformers mixes into ours (a repetition penalty, say)."""
    from transformers import GenerationConfig

    kept = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = kept
