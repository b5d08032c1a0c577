"""Recorded completions and their log-probabilities, as samples: what trainers of scored completions keep of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loomtune.contracts import Answer, Reward, Sample, Segment
from loomtune.run import Run

COLUMNS = {
    "old": ("old", "old_per_token_logps", "old_token_logps"),
    "reference": ("reference", "ref_per_token_logps", "reference_token_logps"),
    "value": ("value", "values", "old_values"),
    "returns": ("returns",),
}
"""Our columns, and under which names each is found: `(rows, longest completion)`, padded at the end."""

LAYOUT = {"prompt_ids", "prompt_mask", "completion_mask"}


class Scores(Reward):
    """Stands where a reward has to be: recorded completions have their scores."""

    def score(self, run: Run, answers: Sequence[Answer]) -> list[float]:
        """Nobody asks."""
        raise AssertionError("nothing recorded is scored")


def is_completions(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is prompts and completions, each by itself."""
    return batch.keys() >= LAYOUT and not batch.keys().isdisjoint({"completion_ids", "completion_ids_padded"})


def samples_of_completions(batch: Mapping[str, Any], objective: Any) -> list[Sample]:
    """A recorded batch as samples, one a completion.

    batch: `prompt_ids`, `prompt_mask` (padded at the left), `completion_ids`, `completion_mask` (at the right), `(rows,
    ...)` each; `advantages` `(rows,)` or `(rows, longest)`, or `rewards` `(rows,)`, of which the objective makes them,
    `objective.group` rows together; log-probabilities by the names of `COLUMNS`.
    """
    ids = batch["completion_ids_padded" if "completion_ids_padded" in batch else "completion_ids"]
    advantages = batch["advantages"] if "advantages" in batch else _advantages(batch["rewards"], objective)
    columns = {"advantage": advantages, **columns_of(batch)}
    found = []
    for i, (tokens, mask) in enumerate(zip(ids, batch["completion_mask"], strict=True)):
        learned = np.asarray(mask) > 0
        prompt = np.asarray(batch["prompt_ids"][i])[np.asarray(batch["prompt_mask"][i]) > 0]
        found.append(answered(prompt, np.asarray(tokens)[: len(learned)][learned], _of_row(columns, i, learned)))
    return found


def columns_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch has of our columns."""
    known = {ours: next((name for name in names if batch.get(name) is not None), "") for ours, names in COLUMNS.items()}
    return {ours: batch[name] for ours, name in known.items() if name}


def _of_row(columns: Mapping[str, Any], row: int, learned: Any) -> dict[str, Any]:
    """A row's columns at what is learned of it; one number counts for all its tokens."""
    of = {name: np.asarray(values[row], np.float32) for name, values in columns.items()}
    return {name: np.full(learned.sum(), each) if not each.ndim else each[learned] for name, each in of.items()}


def answered(prompt: Any, tokens: Any, columns: Mapping[str, Any]) -> Sample:
    """A prompt and its completion, every token of which is a target."""
    whole = np.concatenate([prompt, tokens]).astype(np.int32)
    segment = Segment(whole, np.arange(len(whole)) >= len(prompt), columns=columns)
    return Sample((segment,), {"sequences": 1.0, "tokens": float(len(tokens)), "first": 0.0})


def _advantages(rewards: Sequence[float], objective: Any) -> list[float]:
    each = np.asarray(rewards, np.float64).reshape(-1, objective.settings.group)
    return [float(value) for group in objective.advantages(list(each)) for value in group]


def plainly(settings: Mapping[str, Any]) -> dict[str, Any]:
    """TRL says by a truth whether advantages are scaled, and since 0.22 also by what."""
    said = settings.get("scale_rewards")
    return {**settings, "scale_rewards": "group" if said else "none"} if isinstance(said, bool) else dict(settings)
