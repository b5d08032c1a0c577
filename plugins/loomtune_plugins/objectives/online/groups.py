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

COUNTS = ("sequences", "tokens")
"""The numbers of a sample that only the weight of a step is made of."""


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


def begin(run: Run, drawn: Sequence[Drawn], count: int, sampling: Sampling) -> Callable[[], list[Completion]]:
    """Begins `count` completions of each prompt; gives what waits for them.

    A completion's noise belongs to (seed, visit, place in the group): to no rank, batch or step.
    """
    asked = [(one, place) for one in drawn for place in range(count)]
    prompts = [one.sample.segments[0].tokens.tolist() for one, _ in asked]
    keys = [derive(run.settings.seed, "rollout", one.visit, place) for one, place in asked]
    return run.begin(prompts, keys, sampling)


def grouped(run: Run, drawn: Sequence[Drawn], completions: Sequence[Completion]) -> list[Group]:
    """Each prompt with its completions, which are not scored yet."""
    found = []
    for one, made in zip(drawn, np.array_split(np.arange(len(completions)), len(drawn)), strict=True):
        part = [_scored(run, one, completions[i]) for i in made]
        found.append(Group(one, part[0].answer.prompt, part))
    return found


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


def laid(group: Group, learned: Sequence[bool], *, shared: bool, columns: Mapping[str, Sequence[Any]]) -> Sample:
    """The sample of a group: its prompt, and behind it the completions that are learned, every token a target.

    learned: which of those `kept`. shared: whether completions are children of one prompt; else there is one at most,
    in a segment with its prompt. columns: by name, of each of those kept a number, or `(tokens, ...)`.
    """
    before, nothing = np.array(group.prompt, np.int32), np.zeros(len(group.prompt), np.bool_)
    chosen = [(i, one) for i, one in enumerate(group.kept) if learned[i] and one.answer.tokens]
    answers = [np.array(one.answer.tokens, np.int32) for _, one in chosen]
    targets = [np.ones(len(ids), np.bool_) for ids in answers]
    each = [{name: _spread(values[i], one) for name, values in columns.items()} for i, one in chosen]
    if shared:
        widths = {name: np.shape(next(iter(values), ()))[1:] for name, values in columns.items()}
        none = {name: np.zeros((0, *width), np.float32) for name, width in widths.items()}
        children = [Segment(*parts[:2], 0, parts[2]) for parts in zip(answers, targets, each, strict=True)]
        return Sample((Segment(before, nothing, columns=none), *children))
    own = each[0] if each else {name: np.zeros(0, np.float32) for name in columns}
    return Sample((Segment(np.concatenate([before, *answers]), np.concatenate([nothing, *targets]), columns=own),))


def _spread(value: Any, one: Scored) -> NDArray[np.float32]:
    """`(tokens, ...)`: a completion's number for each of its tokens, or what they have already."""
    found = np.asarray(value, np.float32)
    return found if found.ndim else np.full(len(one.answer.tokens), found, np.float32)


def apart(group: Group, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """What is known of the targets of the sample of all that are kept, `(targets, ...)`, for each of these."""
    ends = np.cumsum([len(one.answer.tokens) for one in group.kept])
    return np.split(values, ends[:-1]) if len(ends) else []


def folded(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of a step that have targets; what the others count is counted with the first of them.

    So no prompt is computed of whose completions nothing is learned, and the step's weight is what it was.
    """
    kept = [sample for sample in samples if sample.targets]
    if kept:
        counts = {name: sum(sample.numbers[name] for sample in samples if not sample.targets) for name in COUNTS}
        more = {name: kept[0].numbers[name] + count for name, count in counts.items()}
        kept[0] = replace(kept[0], numbers={**kept[0].numbers, **more})
    return kept
