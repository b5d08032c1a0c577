"""A run draws the same completions in every layout, on any number of processes and in batches of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from loomtune_plugins.rollouts.noise import Choice
from runs.rolling import keys, prompts, rolled, rolled_few, sampling
from runs.worlds import Worlds
from support import shared

NEAR = 1e-4
"""Between the two best of the scores with noise: fp32 may order them either way."""

Drawn = list[tuple[list[int], list[float]]]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "batches of 1": (1, ["sharding=single", "rollout.batch=1"]),
    "batches of 7": (1, ["sharding=single", "rollout.batch=7"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "fsdp on 2": (2, ["sharding=fsdp"]),
    "fsdp on 2, batches of 5": (2, ["sharding=fsdp", "rollout.batch=5"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "zero 2 on 2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
    "fsdp on 4": (4, ["sharding=fsdp"]),
    "fsdp, sequence 2, on 4": (4, ["sharding=fsdp", "sharding.sequence=2"]),
    "zero 3 on 4": (4, ["sharding=zero", "sharding.stage=3"]),
    "continuous": (1, ["sharding=single", "rollout=continuous"]),
    "continuous, fsdp on 2": (2, ["sharding=fsdp", "rollout=continuous", "rollout.batch=9"]),
    "continuous, zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "rollout=continuous"]),
}
FAR = 1e-4
"""Between log-probabilities, in nats, of the same tokens; 4e-5 was measured, among tokens drawn at -10 and less."""


@pytest.fixture(scope="module")
def settings(real: list[str]) -> list[str]:
    return [*real, "steps=1"]


@pytest.fixture(scope="module")
def alone(
    worlds: Worlds, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str], Callable[..., dict[str, Any]]], Drawn]:
    """What one process draws in one batch."""
    made: dict[str, Drawn] = {}

    def of(settings: list[str], work: Callable[..., dict[str, Any]]) -> Drawn:
        if work.__name__ not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[work.__name__] = worlds.train(1, [*settings, "sharding=single"], folder, work=work).result["drawn"]
        return made[work.__name__]

    return of


def faults(path: Path, one: Drawn, other: Drawn) -> list[int]:
    """Numbers of prompts whose completions part at a token that was no toss-up."""
    model, asked = LlamaForCausalLM.from_pretrained(path).eval(), prompts(len(one))
    found = []
    for number, ((tokens, _), (others, _)) in enumerate(zip(one, other, strict=True)):
        if tokens == others:
            continue
        at = next(i for i, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1])
        with torch.no_grad():
            logits = model(torch.tensor([[*asked[number], *tokens[:at]]])).logits[:, -1]
        scores, _, _ = Choice(sampling(1))(logits, [(keys(len(one))[number], at)])
        best, second = scores[0].topk(2).values.tolist()
        if best - second > NEAR:
            found.append(number)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_completions_of_64_tokens(
    layout: str, worlds: Worlds, settings: list[str], alone: Callable[..., Drawn], tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    one = alone(settings, rolled)
    other = worlds.train(size, [*settings, *how], tmp_path / "run", work=rolled).result["drawn"]
    assert len(one) == 64 and sum(len(tokens) for tokens, _ in one) > 48 * 64
    assert len({tuple(tokens) for tokens, _ in one}) == 64, "equal prompts have keys of their own"
    assert not faults(shared("models", "stories260k"), one, other)
    agree(one, other)


@pytest.mark.parametrize("layout", ["fsdp on 2, batches of 5"])
def test_a_few_short_ones(
    layout: str, worlds: Worlds, tiny: list[str], alone: Callable[..., Drawn], tmp_path: Path, tied_model: Path
) -> None:
    size, how = LAYOUTS[layout]
    settings = [*tiny, "steps=1"]
    one = alone(settings, rolled_few)
    other = worlds.train(size, [*settings, *how], tmp_path / "run", work=rolled_few).result["drawn"]
    assert not faults(tied_model, one, other)
    agree(one, other)


def agree(one: Drawn, other: Drawn) -> None:
    """Of what is the same, the log-probabilities are."""
    pairs = [(a, b) for (tokens, a), (others, b) in zip(one, other, strict=True) if tokens == others]
    assert len(pairs) >= len(one) - 1
    far = [abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    print(f"{len(pairs)} of {len(one)} alike, log-probabilities within {max(far):.1e}")
    assert max(far) < FAR
