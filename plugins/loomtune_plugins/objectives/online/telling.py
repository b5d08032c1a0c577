"""What is said of a batch of completions: numbers for the log, rows for people, and in plain words what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Completion
from loomtune.errors import UserError
from loomtune_plugins.objectives.online.credit import deviation
from loomtune_plugins.objectives.online.groups import Group, Scored

if TYPE_CHECKING:
    from loomtune.run import Run

EMPTY_BATCHES = 8
"""After so many batches one after the other without any reward, nobody believes that the next one will have any."""

SIGNS = 3
"""A sign of trouble is told once it is seen in so many batches one after the other: one alone may be chance."""


class NoReward(UserError):
    """No reward could be had of any completion, again and again."""


class NothingWritten(UserError):
    """No completion has a token that is learned, again and again."""


class NoSpread(UserError):
    """All completions of every prompt are worth the same, again and again."""


@contextmanager
def timed(run: Run, name: str) -> Iterator[None]:
    """Notes how long something took, in seconds on rank 0; what was noted for the same step is added to."""
    began = time.perf_counter()
    yield
    seconds = run.world.broadcast(time.perf_counter() - began)
    run.noted[name] = run.noted.get(name, 0.0) + seconds


def counted(run: Run, completions: Sequence[Completion]) -> None:
    """Notes how many tokens were drawn, and how fast, of all batches of prompts that the next step is made of."""
    drawn = run.noted.get("rollout_tokens", 0.0) + sum(len(one.tokens) for one in completions)
    rate = drawn / max(run.noted["rollout_seconds"], 1e-9)
    run.noted |= {"rollout_tokens": drawn, "rollout_tokens_per_second": rate}


def is_fresh(run: Run) -> bool:
    """Whether the policy, before its first step, computes what its reference does.

    Not with an adapter that was trained before, which the reference leaves out, nor with virtual tokens.
    """
    adapter: Mapping[str, Any] = next(iter(run.plan.choices("adapter").values()), {})
    return not adapter.get("path") and not run.virtual_tokens


def tell(run: Run, groups: Sequence[Group], credit: Sequence[Sequence[Any]]) -> None:
    """Notes the batch's numbers for the next step, and shows its completions to observers. credit: of those kept.

    Which share of groups is equal was noted already where some of them gave way to others and are in no batch.
    """
    found = numbers(groups, credit)
    if "prompts/drawn" in run.noted:
        found.pop("groups/equal", None)
    run.noted |= found
    samples = [row for group, each in zip(groups, credit, strict=True) for row in _rows(run, group, each)]
    run.events.tell("rollout_finished", run=run, step=run.step + 1, samples=samples)


def numbers(groups: Sequence[Group], credit: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Means over a batch's completions; those of rewards over the ones that have them."""
    every = [one for group in groups for one in group.all]
    rewards = np.array([one.reward for one in every if not one.lost])
    gains = np.array([float(np.mean(each)) for part in credit for each in part if np.size(each)])
    found = {
        "rewards/mean": _mean(rewards),
        "rewards/std": deviation(rewards),
        "rewards/lost": float(sum(one.lost for one in every)),
        "advantages/std": deviation(gains),
        "advantages/max": float(gains.max(initial=0.0)),
        "advantages/min": float(gains.min(initial=0.0)),
        "completions/mean_length": _mean([len(one.answer.tokens) for one in every]),
        "completions/ended": _mean([one.answer.ended for one in every]),
        "completions/empty": _mean([not one.answer.tokens for one in every]),
    }
    if len(groups[0].all) > 1:
        found["groups/equal"] = _mean([group.equal for group in groups])
        found["groups/std"] = _mean([deviation(group.rewards) for group in groups])
    for name in every[0].scores:
        scores = np.array([one.scores[name] for one in every])
        found[f"rewards/{name}"] = _mean(scores[np.isfinite(scores)])
    return found


def _mean(values: Any) -> float:
    """NaN of nothing, as a step's metric without weight is."""
    return float(np.mean(values)) if len(values) else float("nan")


def _rows(run: Run, group: Group, credit: Sequence[Any]) -> Iterator[Mapping[str, object]]:
    advantages = iter(credit)
    prompt = run.tokenizer.decode(group.prompt)
    for place, one in enumerate(group.all):
        gain = None if one.lost else next(advantages)
        yield {
            "prompt": prompt,
            "completion": one.answer.text,
            "reward": None if one.lost else one.reward,
            "rewards": dict(one.scores),
            "advantage": float(np.mean(gain)) if gain is not None and np.size(gain) else None,
            "ended": one.answer.ended,
            "visit": group.drawn.visit,
            "place": place,
        }


@dataclass(slots=True)
class Signs:
    """What goes wrong, said once, in plain words.

    seen: by the name of a sign, in how many batches running it was seen. said: those that were told.
    entropy: the policy's at the run's first step. unscored, unlearned: batches running without a reward, or a step.
    """

    seen: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    entropy: float | None = None
    unscored: int = 0
    unlearned: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Signs:
        """From what `state` gave."""
        return cls(**state)

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def nothing_scored(self, run: Run) -> None:
        """No completion of a batch has a reward. Raises NoReward where that goes on."""
        self.unscored += 1
        if self.unscored >= EMPTY_BATCHES:
            what = f"{self.unscored} batches of completions one after the other have no reward: each was NaN"
            raise NoReward.of(what, "see what the chosen reward= told; mend it, and resume the run")

    def learned(self, run: Run, something: bool) -> None:
        """Whether a batch gave a step. Raises NothingWritten where none has for long."""
        self.unlearned = 0 if something else self.unlearned + 1
        if self.unlearned >= EMPTY_BATCHES:
            what = f"{self.unlearned} batches one after the other have no completion with a token to learn"
            cure = "raise max_length where prompts fill it, or leave objective.mask_truncated out; check what it writes"
            raise NothingWritten.of(what, cure)

    def look(self, run: Run, groups: Sequence[Group]) -> None:
        """Compares a batch, and the last step's metrics, with what is healthy."""
        self.unscored = 0
        entropy = run.metrics.get("entropy")
        if self.entropy is None and entropy is not None:
            self.entropy = float(entropy)
        for name, (bad, words) in _signs(run, groups, self.entropy).items():
            self.seen[name] = self.seen.get(name, 0) + 1 if bad else 0
            if self.seen[name] >= SIGNS and name not in self.said:
                self.said.append(name)
                run.tell_once(f"step {run.step + 1}: {words}")


def _signs(run: Run, groups: Sequence[Group], before: float | None) -> dict[str, tuple[bool, str]]:
    """By name: whether it is seen now, and what is said of it."""
    every: list[Scored] = [one for group in groups for one in group.all]
    metrics = run.metrics
    entropy, kl, largest = metrics.get("entropy"), metrics.get("kl", 0.0), metrics.get("ratio/max", 1.0)
    ended = sum(one.answer.ended for one in every)
    return {
        "equal": (
            all(group.equal for group in (groups if len(groups[0].all) > 1 else [Group(groups[0].drawn, (), every)])),
            "every completion of a prompt gets the same reward, for every prompt: there is nothing to learn from. "
            "Choose prompts that are neither too easy nor too hard, a reward that tells answers apart, a larger "
            "objective.group, or objective.dynamic",
        ),
        "empty": (
            sum(not one.answer.tokens for one in every) * 2 > len(every),
            "most completions are empty: prompts fill max_length, or the policy ends at once. "
            "Raise max_length; check that prompts are written as the model was trained on them",
        ),
        "same": (
            len(every) > 2 and len({tuple(one.answer.tokens) for one in every}) == 1,
            "all completions, whatever their prompt, are the same: the policy has collapsed. Resume from an earlier "
            "checkpoint with a smaller optimizer.lr, or a KL to the reference (objective.beta)",
        ),
        "cut": (
            ended == 0,
            "no completion comes to an end: all are cut. Raise objective.max_new_tokens, or check that the model was "
            "trained to end its answers",
        ),
        "entropy": (
            entropy is not None and before is not None and entropy < 0.05 * before,
            "the policy's entropy is below a twentieth of what it was: its completions hardly differ any more. Lower "
            "optimizer.lr or objective.epochs, raise objective.temperature, or set objective.beta",
        ),
        "kl": (
            kl > 1.0,
            "the policy has gone more than 1 nat a token from its reference: a reward may be exploited. Read the "
            "completions; raise objective.beta, or lower optimizer.lr",
        ),
        "ratio": (
            largest > 100.0,
            "a token is more than 100 times as likely as when it was drawn: steps are too large for what was drawn. "
            "Lower optimizer.lr, objective.epochs or objective.minibatches",
        ),
    }
