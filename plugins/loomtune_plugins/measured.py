"""What the lines of metrics.jsonl say about evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OF_THE_LOOP = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_seen",
    "seconds",
    "tokens_per_second",
    "memory_bytes",
    "nonfinite",
)
OF_ROLLOUTS = (
    "rewards/",
    "advantages/",
    "completions/",
    "groups/",
    "pairs/",
    "rollout",
    "reward_seconds",
    "read_seconds",
)
"""How names begin of what is noted once a batch of completions, which several steps may learn from."""
OF_USE = ("seconds/", "memory_bytes/", "mfu", "exposed_communication_seconds", "all_tokens_per_second")
"""How names begin of what a step used (`docs/measuring.md`). Not every step has all of it."""

BEFORE = "_before"


@dataclass(frozen=True, slots=True)
class Measured:
    """An evaluation's metric before training, where it was taken, and at its last evaluation."""

    name: str
    before: float | None
    after: float | None


def evaluations(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics that come from evaluations: those measured at step 0, and those that not every step has."""
    steps = [line for line in lines if line.get("step", 0) > 0]
    counts = Counter(key for line in steps for key in line)
    found = {_plain(key): None for line in lines if line.get("step") == 0 for key in line}
    found |= {_plain(key): None for key, count in counts.items() if count < len(steps) or key.endswith(BEFORE)}
    return [key for key in found if key not in OF_THE_LOOP and not key.startswith((*OF_ROLLOUTS, *OF_USE))]


def by_step(lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The evaluations' metrics alone, by the step after which they were measured."""
    names = {entry for name in evaluations(lines) for entry in (name, name + BEFORE)}
    found = {line["step"]: {key: line[key] for key in names & line.keys() if line[key] is not None} for line in lines}
    return {step: metrics for step, metrics in found.items() if metrics}


def before_and_after(lines: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[Measured]:
    """Each named metric with its value before training and its last."""
    return [Measured(name, _before(lines, name), _after(lines, name)) for name in names]


def _before(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    for line in lines:
        if line.get(name + BEFORE) is not None:
            return float(line[name + BEFORE])
        if line.get("step") == 0 and line.get(name) is not None:
            return float(line[name])
    return None


def _after(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [line[name] for line in lines if line.get("step", 0) > 0 and line.get(name) is not None]
    return float(found[-1]) if found else None


def _plain(key: str) -> str:
    """The metric's name without the mark of a measurement before training."""
    return key.removesuffix(BEFORE)
