"""Completions per second: the rollout engines against transformers' `generate`, a prompt at a time.

`python benchmarks/rollouts.py --help`; exit code 1 where a bar is missed. All contenders take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loomtune.catalogue import installed
from loomtune.contracts import EngineSpec, Role, Sampling
from loomtune.world import World

LEAST = 5.0
"""How many times as many completions per second as one by one the default engine must give on 64 prompts."""

ALONE = "generate, one by one"
Rates = dict[str, tuple[float, float]]
"""Completions and tokens per second by contender."""


def role(path: Path, world: World) -> Role:
    """The frozen model of a folder, on this process."""
    build = installed().build
    spec = EngineSpec(
        model=build("model", "huggingface", {"path": str(path)}),
        adapter=build("adapter", "full", {}),
        kernel=build("kernel", "sdpa", {}),
        optimizer=None,
        precision="fp32",
        seed=0,
    )
    return Role("policy", build("sharding", "single", {}).engine(spec, world))


def drawn_prompts(count: int, lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shortest, longest = lengths
    drawn = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in drawn]


def one_by_one(role: Role, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    """As a plain script would do it; gives how many tokens were written."""
    written = 0
    with role.engine.evaluating(), role.engine.gathered() as module, torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "pad_token_id": 0}
            stops = {"max_new_tokens": sampling.max_tokens, "eos_token_id": list(sampling.stop) or None}
            made: Any = module.generate(ids, attention_mask=torch.ones_like(ids), **how, **stops)  # type: ignore[operator]
            written += made.shape[1] - ids.shape[1]
    return written


def engine(
    name: str, settings: dict[str, Any], role: Role, world: World
) -> Callable[[Sequence[Sequence[int]], Sampling], int]:
    built = installed().build("rollout", name, settings)

    def run(prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        return sum(len(one.tokens) for one in built.generate(role, prompts, range(len(prompts)), sampling, world))

    return run


def rate(work: Callable[[], int], count: int) -> tuple[float, float]:
    """Completions and tokens per second."""
    began = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - began
    return count / seconds, tokens / seconds


def measured(contenders: dict[str, Callable[[], int]], count: int, rounds: int) -> Rates:
    """The best of each contender's rounds, which alternate; one more before them warms up and counts for nothing."""
    best: Rates = {}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            found = rate(work, count)
            best[name] = max(found, best.get(name, found)) if turn else (0.0, 0.0)
    return best


def table(found: Rates, against: str) -> str:
    base = found[against][0]
    lines = ["| | completions/s | tokens/s | times |", "|---|---|---|---|"]
    lines += [f"| {name} | {rate:.1f} | {tokens:.0f} | {rate / base:.1f} |" for name, (rate, tokens) in found.items()]
    return "\n".join(lines)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder as transformers saves it")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--lengths", type=int, nargs=2, default=(8, 48), help="the shortest and the longest prompt")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt in the second table")
    parser.add_argument("--grouped", type=int, nargs=2, default=(200, 300), help="lengths of the prompts there")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    asked, world = parsed(words), World(0, 1, 0, torch.device("cpu"))
    policy = role(asked.model, world)
    vocabulary = policy.engine.spec.model.vocabulary()
    sampling = Sampling(max_tokens=asked.tokens, temperature=1.0)
    prompts = drawn_prompts(asked.prompts, asked.lengths, vocabulary)
    batched = engine("huggingface", {"batch": asked.prompts}, policy, world)
    single = engine("huggingface", {"batch": 1}, policy, world)
    continuous = engine("continuous", {"batch": asked.prompts}, policy, world)
    found = measured(
        {
            ALONE: lambda: one_by_one(policy, prompts, sampling),
            "huggingface": lambda: batched(prompts, sampling),
            "huggingface, rollout.batch=1": lambda: single(prompts, sampling),
            "continuous": lambda: continuous(prompts, sampling),
        },
        len(prompts),
        asked.rounds,
    )
    print(table(found, ALONE), end="\n\n")
    unlike = drawn_prompts(asked.prompts, asked.grouped, vocabulary)
    alike = [prompt for prompt in unlike[:: asked.group] for _ in range(asked.group)][: asked.prompts]
    each, once = f"huggingface, {len(unlike)} long prompts", f"huggingface, {asked.group} completions of each"
    long = {each: lambda: batched(unlike, sampling), once: lambda: batched(alike, sampling)}
    print(table(measured(long, len(unlike), asked.rounds), each))
    return 0 if found["huggingface"][0] >= LEAST * found[ALONE][0] else 1


if __name__ == "__main__":
    sys.exit(main())
