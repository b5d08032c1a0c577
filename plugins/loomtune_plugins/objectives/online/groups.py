"""The completions of a prompt, with what they were worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Answer, Completion, Drawn, Reward, Sample, Segment
from loomtune.seeds import derive

if TYPE_CHECKING:
    from loomtune.contracts import Sampling
    from loomtune.run import Run

LOST = math.nan


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion. log_probs: its engine's, of each token, or empty. scores: of each reward, by name, NaN where it
    could not be had. reward: their weighted sum; NaN where one of them is."""

    answer: Answer
    log_probs: Sequence[float] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    reward: float = LOST

    @property
    def lost(self) -> bool:
        """Whether nobody knows what it is worth."""
        return math.isnan(self.reward)


@dataclass(frozen=True, slots=True)
class Group:
    """A visit of a prompt, and all its completions, in the order of their places."""

    drawn: Drawn
    prompt: Sequence[int]
    all: Sequence[Scored]

    @property
    def kept(self) -> list[Scored]:
        """Those that have a reward."""
        return [one for one in self.all if not one.lost]

    @property
    def rewards(self) -> NDArray[np.float64]:
        """`(kept,)`"""
        return np.array([one.reward for one in self.kept], np.float64)

    @property
    def equal(self) -> bool:
        """Whether no completion is better than another."""
        return len(set(self.rewards.tolist())) <= 1


def begin(run: Run, drawn: Sequence[Drawn], count: int, sampling: Sampling) -> Callable[[], list[Group]]:
    """Begins `count` completions of each prompt; gives what waits for them, which are not scored yet.

    A completion's noise belongs to (seed, visit, place in the group): to no rank, batch or step.
    """
    asked = [(one, place) for one in drawn for place in range(count)]
    prompts = [one.sample.segments[0].tokens.tolist() for one, _ in asked]
    keys = [derive(run.settings.seed, "rollout", one.visit, place) for one, place in asked]
    wait = run.begin(prompts, keys, sampling)

    def end() -> list[Group]:
        answers = [_scored(run, one, made) for (one, _), made in zip(asked, wait(), strict=True)]
        parts = [answers[at : at + count] for at in range(0, len(answers), count)]
        return [Group(one, part[0].answer.prompt, part) for one, part in zip(drawn, parts, strict=True)]

    return end


def _scored(run: Run, drawn: Drawn, made: Completion) -> Scored:
    tokens, stops = [int(token) for token in made.tokens], run.tokenizer.stops
    ended = bool(tokens) and tokens[-1] in stops
    text = run.tokenizer.decode(tokens[:-1] if ended else tokens)
    prompt = drawn.sample.segments[0].tokens.tolist()
    return Scored(Answer(drawn.given, prompt, tokens, text, ended), made.log_probs)


def score(run: Run, groups: Sequence[Group], rewards: Mapping[str, Reward]) -> list[Group]:
    """The groups with what each reward says, and the weighted sum."""
    answers = [one.answer for group in groups for one in group.all]
    found = {name: reward.score(run, answers) for name, reward in rewards.items()}
    assert all(len(scores) == len(answers) for scores in found.values()), "a reward gives each answer a score"
    weights = {name: reward.weight for name, reward in rewards.items()}
    each = iter([{name: _number(scores[i]) for name, scores in found.items()} for i in range(len(answers))])
    return [replace(group, all=[_with(one, next(each), weights) for one in group.all]) for group in groups]


def _number(score: float) -> float:
    """An infinite score is none: no mean could hold it."""
    return float(score) if math.isfinite(score) else LOST


def _with(one: Scored, scores: Mapping[str, float], weights: Mapping[str, float]) -> Scored:
    """A reward of weight 0 is watched, and leaves nothing out."""
    reward = math.fsum(weight * scores[name] for name, weight in weights.items() if weight)
    return replace(one, scores=scores, reward=reward)


def laid(group: Group, learned: Callable[[Scored], bool], *, shared: bool) -> Sample:
    """The sample of a group: its prompt, and behind it those completions that are learned, every token a target.

    shared: whether completions are children of one prompt; else there is one at most, in a segment with its prompt.
    """
    before = np.array(group.prompt, np.int32)
    answers = [np.array(one.answer.tokens, np.int32) for one in group.kept if learned(one) and one.answer.tokens]
    nothing = np.zeros(len(before), np.bool_)
    if shared:
        children = [Segment(ids, np.ones(len(ids), np.bool_), 0) for ids in answers]
        return Sample((Segment(before, nothing), *children))
    (ids,) = answers or [np.zeros(0, np.int32)]
    return Sample((Segment(np.concatenate([before, ids]), np.concatenate([nothing, np.ones(len(ids), np.bool_)])),))


def spread(group: Group, learned: Callable[[Scored], bool], values: Sequence[Any]) -> NDArray[np.float32]:
    """`(targets,)` of the group's sample: each completion's number for each of its tokens. values: of all `kept`, a
    number or `(tokens,)` each."""
    chosen = [
        np.broadcast_to(np.asarray(value, np.float32), len(one.answer.tokens))
        for one, value in zip(group.kept, values, strict=True)
        if learned(one)
    ]
    return np.concatenate([np.zeros(0, np.float32), *chosen])
