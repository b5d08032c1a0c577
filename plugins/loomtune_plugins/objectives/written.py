"""Answers that the policy itself writes, in the middle of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loomtune.contracts import Sampling, Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loomtune.run import Run


@dataclass(frozen=True, slots=True)
class Written:
    """An answer to a prompt. ended: whether its last token is one that ends answers; where it was cut there is none."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    ended: bool

    def segment(self, learned: NDArray[np.bool_] | None = None) -> Segment:
        """Prompt and answer, whose every token is a target, the end token too. learned: which tokens of the prompt
        are, `(prompt,)`; None: none of them."""
        before = np.zeros(len(self.prompt), np.bool_) if learned is None else learned
        return Segment(
            np.array([*self.prompt, *self.tokens], np.int32),
            np.concatenate([before, np.ones(len(self.tokens), np.bool_)]),
        )


def write(run: Run, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float) -> list[Written]:
    """The policy's answers to all prompts, the same list on every rank, in order; no longer than the run's samples.

    What is drawn depends on the seed, the step and a prompt's number alone, never on ranks or batches.
    """
    stops = run.tokenizer.stops
    sampling = Sampling(max_tokens=max_tokens, max_length=run.max_length, temperature=temperature, stop=stops)
    answers = [
        Written(prompt, tokens, bool(tokens) and tokens[-1] in stops)
        for prompt, tokens in zip(prompts, run.generate(prompts, sampling), strict=True)
    ]
    decode = run.tokenizer.decode
    told = [{"prompt": decode(one.prompt), "completion": decode(one.tokens)} for one in answers]
    run.events.tell("rollout_finished", run=run, step=run.step, samples=told)
    return answers
